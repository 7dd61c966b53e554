"""What a dashboard consists of, as plain values, and how grafana-foundation-sdk makes Grafana's JSON of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from string import ascii_uppercase
from typing import Any

from grafana_foundation_sdk.builders import common as commonbuilders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

RUNBOOKS = "https://runbooks.example.com/"
"""Placeholder for where the pages of docs/runbooks are; the chart's `runbookUrl` replaces it."""
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
SCHEMA = 38
"""Of Grafana 10.1, which later versions migrate by themselves."""
GREEN, AMBER, RED = "green", "orange", "red"


class Form(Enum):
    """How a panel draws its series."""

    STAT = auto()
    LINES = auto()
    STACKED = auto()
    HEATMAP = auto()
    TABLE = auto()


@dataclass(frozen=True, slots=True)
class Query:
    """One query, and the name of each of its series."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel."""

    title: str
    shows: str
    """What the figures are, in full sentences."""
    act: str
    """What to do when they are bad, in full sentences; empty where there is nothing to do."""
    unit: str
    """As Grafana names it."""
    queries: tuple[Query, ...]
    form: Form = Form.LINES
    width: int = 8
    """Of 24 columns."""
    bounds: tuple[float, float] | None = None
    """Where figures become doubtful, and where bad. The greater the better if the first is the greater."""
    most: float | None = None
    """The greatest value there can be."""
    alerts: tuple[str, ...] = ()
    """Alerts about the same figures; the panel links to their runbooks."""
    quiet: str = ""
    """What it means that there is no series, said where Grafana would say 'No data'; empty: there always is one."""

    @property
    def description(self) -> str:
        """What Grafana shows behind the i."""
        return f"{self.shows} {self.act}".strip()


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice that the reader makes: values of a label."""

    name: str
    label: str
    description: str
    query: str
    """As Grafana asks Prometheus: `label_values(...)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One dashboard."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, in order."""
        return tuple(panel for row in self.rows for panel in row.panels)

    @property
    def expressions(self) -> tuple[tuple[Panel, Query], ...]:
        """Every query with its panel."""
        return tuple((panel, query) for panel in self.panels for query in panel.queries)


def as_json(board: Dashboard) -> str:
    """The JSON that Grafana imports."""
    return json.dumps(_board(board).build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _board(board: Dashboard) -> builders.Dashboard:
    built = (
        builders.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["kvcluster"])
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .version(1)
        .links([_to_the_others(), _to_the_runbooks()])
        .with_variable(
            builders.DatasourceVariable("datasource")
            .label("Data source")
            .description("The Prometheus that scrapes the fleet.")
            .type("prometheus")
        )
    )
    built._internal.schema_version = SCHEMA  # the builder has no method for it
    for variable in board.variables:
        built.with_variable(_variable(variable))
    number = 0
    for row in board.rows:
        number += 1
        built.with_row(builders.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            built.with_panel(_panel(panel, number))
    return built


def _to_the_others() -> builders.DashboardLink:
    link = builders.DashboardLink("KVCluster").type(dashboard.DashboardLinkType.DASHBOARDS).tags(["kvcluster"])
    return link.tooltip("The other dashboards, with the same choices.").include_vars(True).keep_time(True)


def _to_the_runbooks() -> builders.DashboardLink:
    link = builders.DashboardLink("Runbooks").type(dashboard.DashboardLinkType.LINK).url(RUNBOOKS + "README")
    return link.icon("doc").tooltip("A page for each alert.").target_blank(True)


def _variable(variable: Variable) -> builders.QueryVariable:
    every = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
    return (
        builders.QueryVariable(variable.name)
        .label(variable.label)
        .description(variable.description)
        .datasource(SOURCE)
        .query({"query": variable.query, "refId": variable.name, "qryType": 1})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(every)
    )


def _panel(panel: Panel, number: int) -> Any:
    built = _FORMS[panel.form](panel)
    built.id(number).title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    built.span(panel.width).height(4 if panel.form is Form.STAT else 8)
    built.thresholds(_thresholds(panel.bounds))
    if panel.quiet:
        built.no_value(panel.quiet)
    if panel.most is not None:
        built.max(panel.most)
    built.links([_runbook(alert) for alert in panel.alerts])
    for letter, query in zip(ascii_uppercase, panel.queries, strict=False):
        built.with_target(_target(panel.form, query, letter))
    return built


def _target(form: Form, query: Query, letter: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(SOURCE).ref_id(letter).expr(query.expression)
    target.legend_format(query.legend)
    if form is Form.TABLE:
        return target.instant().format(PromQueryFormat.TABLE)
    return target.range().format(PromQueryFormat.HEATMAP if form is Form.HEATMAP else PromQueryFormat.TIME_SERIES)


def _runbook(alert: str) -> builders.DashboardLink:
    link = builders.DashboardLink(f"Runbook of {alert}").type(dashboard.DashboardLinkType.LINK)
    return link.url(RUNBOOKS + alert).target_blank(True)


def _thresholds(bounds: tuple[float, float] | None) -> builders.ThresholdsConfig:
    steps = [dashboard.Threshold(None, GREEN)]
    if bounds is not None:
        doubtful, bad = bounds
        if doubtful > bad:
            steps = [dashboard.Threshold(*step) for step in ((None, RED), (bad, AMBER), (doubtful, GREEN))]
        else:
            steps += [dashboard.Threshold(doubtful, AMBER), dashboard.Threshold(bad, RED)]
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


# --- the forms ---


def _stat(panel: Panel) -> stat.Panel:
    reduced = commonbuilders.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .reduce_options(reduced)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .text_mode(common.BigValueTextMode.AUTO)
    )


def _lines(panel: Panel) -> timeseries.Panel:
    legend = commonbuilders.VizLegendOptions().display_mode(common.LegendDisplayMode.LIST).show_legend(True)
    built = (
        timeseries.Panel()
        .legend(legend.placement(common.LegendPlacement.BOTTOM))
        .tooltip(commonbuilders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .line_width(1)
        .fill_opacity(10)
        .show_points(common.VisibilityMode.NEVER)
        .min(0)
    )
    if panel.bounds is not None:
        style = commonbuilders.GraphThresholdsStyleConfig().mode(
            common.GraphTresholdsStyleMode.DASHED  # spelt so in the package
        )
        built.thresholds_style(style)
    return built


def _stacked(panel: Panel) -> timeseries.Panel:
    return _lines(panel).fill_opacity(40).stacking(commonbuilders.StackingConfig().mode(common.StackingMode.NORMAL))


def _heatmap(panel: Panel) -> heatmap.Panel:
    linear = commonbuilders.ScaleDistributionConfig().type(common.ScaleDistribution.LINEAR)
    built = heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit("s")).scale_distribution(linear)
    return built.hide_legend().show_tooltip()


def _table(panel: Panel) -> table.Panel:
    hidden = dict.fromkeys(("Time", "Value", "__name__", "instance", "job", "alertstate"), True)
    organised = dashboard.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    link = {"title": "Runbook", "url": RUNBOOKS + "${__value.text}", "targetBlank": True}
    to_runbook = dashboard.DynamicConfigValue("links", [link])
    built = table.Panel().show_header(True).with_transformation(organised)
    return built.override_by_name("alertname", [to_runbook])


_FORMS: dict[Form, Callable[[Panel], Any]] = {
    Form.STAT: _stat,
    Form.LINES: _lines,
    Form.STACKED: _stacked,
    Form.HEATMAP: _heatmap,
    Form.TABLE: _table,
}
