// A chart of the last minutes: one or two lines with gaps where there is no value. Its values can be read with the
// mouse and with the arrow keys (it is a slider over time to a screen reader), and all charts show the same moment.

import { attribute, el, show, svg, text } from "./dom.js";
import { age, clock, NONE } from "./format.js";

const SPANS = [180, 300, 600, 900]; // seconds that charts may show
const LEFT = 46; // room for the labels of the axis
const BOTTOM = 18;
const TOP = 6;
const RIGHT = 4;
const TIME = 62; // width of the time at the cursor

/** How many seconds of a history to show: a router that has just started fills its charts, too. */
export function spanOf({ at }) {
  const long = at.length === 0 ? SPANS.at(-1) : at.at(-1) - at[0];
  return SPANS.find((span) => span >= long) ?? SPANS.at(-1);
}

/** Which step all charts point at: a time of the history, or null. */
export class Cursor {
  #charts = [];
  at = null;

  add(chart) {
    this.#charts.push(chart);
  }

  set(at) {
    if (at === this.at) return;
    this.at = at;
    for (const chart of this.#charts) chart.point();
  }
}

export class Chart {
  /**
   * `series`: `[{name, key}]`, one or two; `key` names the list of the history, `format` shows a value. The axis begins
   * at `floor` and extends to `ceiling`, or as far as the values, but at least by `least`. `name` is the title in full.
   * `empty` says why there is nothing to see.
   */
  constructor({ title, name = title, series, format, floor = 0, ceiling = null, least = 0, empty }, cursor) {
    this.series = series;
    this.format = format;
    this.bounds = { floor, ceiling, least };
    this.cursor = cursor;
    this.history = null;
    this.size = { width: 0, height: 0 };
    cursor.add(this);

    this.values = series.map(() => el("span"));
    this.svg = svg("svg", { "aria-hidden": "true", focusable: "false" });
    this.empty = el("p", { class: "plot-empty" }, empty);
    this.plot = el("div", {
      class: "plot", role: "slider", tabindex: "0", "aria-label": `${name}, by time`, "aria-orientation": "horizontal",
      onpointermove: (event) => this.#pointed(event), onpointerdown: (event) => this.#pointed(event),
      onpointerleave: () => this.cursor.set(null), onkeydown: (event) => this.#pressed(event),
      onblur: () => this.cursor.set(null),
    }, this.svg, this.empty);
    this.node = el("figure", { class: "chart" },
      el("div", { class: "chart-head" },
        el("h3", {}, name === title ? title : el("abbr", { title: name }, title)),
        el("div", { class: "chart-values" }, ...series.map((line, index) =>
          el("span", { class: "chart-value" }, line.name && key(line.name, index), this.values[index]))),
      ),
      this.plot);
    new ResizeObserver(([entry]) => {
      this.size = entry.contentRect;
      this.#draw();
    }).observe(this.plot);
  }

  /** Shows a history, whose last step is at the right edge. */
  render(history) {
    this.history = history;
    this.span = spanOf(history);
    this.lines = this.series.map((line) => history[line.key]);
    this.#draw();
  }

  /** Shows the values at the cursor, or the latest. */
  point() {
    const { history, cursor } = this;
    if (history === null) return;
    const index = cursor.at === null ? latest(this.lines) : history.at.indexOf(cursor.at);
    this.values.forEach((node, line) => text(node, index < 0 ? NONE : this.format(this.lines[line][index])));
    this.#knobs(cursor.at === null ? -1 : index);
    const now = index < 0 ? 0 : index;
    attribute(this.plot, "aria-valuemin", 0);
    attribute(this.plot, "aria-valuemax", Math.max(history.at.length - 1, 0));
    attribute(this.plot, "aria-valuenow", now);
    attribute(this.plot, "aria-valuetext", history.at.length === 0 || index < 0 ? "no values yet" : this.#words(now));
  }

  #words(index) {
    const values = this.series.map((line, each) => {
      const value = this.lines[each][index];
      return [line.name, value === null ? "no value" : this.format(value)].filter(Boolean).join(" ");
    });
    return `${clock(this.history.at[index])}: ${values.join(", ")}`;
  }

  #x(at) {
    const share = 1 - (this.end - at) / this.span;
    return LEFT + share * (this.size.width - LEFT - RIGHT);
  }

  #y(value) {
    const [low, high] = this.scale;
    return TOP + (1 - (value - low) / (high - low)) * (this.size.height - TOP - BOTTOM);
  }

  #draw() {
    const { width, height } = this.size;
    if (this.history === null || width < LEFT + 20) return;
    const { at, step_seconds: step } = this.history;
    this.end = at.at(-1) ?? 0;
    const values = this.lines.flat().filter((value) => value !== null);
    show(this.empty, values.length === 0);
    const { ticks, scale } = axis(values, this.bounds);
    this.scale = scale;
    const nodes = [];
    for (const tick of values.length > 0 ? ticks : []) {
      const y = Math.round(this.#y(tick));
      nodes.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
        svg("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, round(this.format(tick))));
    }
    for (const ago of [0, 1, 2, 3].map((third) => (third * this.span) / 3)) {
      const x = this.#x(this.end - ago);
      const anchor = ago === 0 ? "end" : ago === this.span ? "start" : "middle";
      nodes.push(svg("text", { x, y: height - 3, "text-anchor": anchor }, ago === 0 ? "now" : `−${age(ago)}`));
    }
    this.lines.forEach((line, index) => nodes.push(...this.#line(line, index, at, step)));
    this.marks = svg("g");
    this.svg.replaceChildren(...nodes, this.marks);
    this.point();
  }

  /** Runs of values, each a path. A value that stands alone is a point. */
  #line(values, index, at) {
    const nodes = [];
    let run = [];
    const finish = () => {
      if (run.length === 1) {
        nodes.push(svg("circle", { class: `point-${index}`, cx: run[0][0], cy: run[0][1], r: 1.75 }));
      } else if (run.length > 1) {
        const path = `M${run.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L")}`;
        if (index === 0) {
          const base = this.#y(this.scale[0]).toFixed(1);
          nodes.unshift(svg("path", { class: "area", d: `${path}V${base}H${run[0][0].toFixed(1)}Z` }));
        }
        nodes.push(svg("path", { class: `line line-${index}`, d: path }));
      }
      run = [];
    };
    values.forEach((value, step) => {
      if (value === null) finish();
      else if (this.end - at[step] <= this.span) run.push([this.#x(at[step]), this.#y(value)]);
    });
    finish();
    return nodes;
  }

  #knobs(index) {
    if (this.marks === undefined) return;
    const nodes = [];
    if (index >= 0) {
      const x = this.#x(this.history.at[index]);
      const { width, height } = this.size;
      const middle = Math.min(Math.max(x, LEFT + TIME / 2), width - RIGHT - TIME / 2);
      nodes.push(svg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: height - BOTTOM }),
        svg("rect", { class: "cursor-time", x: middle - TIME / 2, y: height - 16, width: TIME, height: 17, rx: 4 }),
        svg("text", { x: middle, y: height - 3, "text-anchor": "middle", class: "cursor-text" }, clock(this.history.at[index])));
      this.lines.forEach((line, each) => {
        if (line[index] !== null) nodes.push(svg("circle", { class: `knob point-${each}`, cx: x, cy: this.#y(line[index]), r: 4.5 }));
      });
    }
    this.marks.replaceChildren(...nodes);
  }

  #pointed(event) {
    const at = this.history?.at ?? [];
    if (at.length === 0) return;
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const wanted = this.end - (1 - (x - LEFT) / (this.size.width - LEFT - RIGHT)) * this.span;
    this.cursor.set(at.reduce((best, each) => (Math.abs(each - wanted) < Math.abs(best - wanted) ? each : best)));
  }

  #pressed(event) {
    const at = this.history?.at ?? [];
    if (at.length === 0) return;
    const last = at.length - 1;
    const now = this.cursor.at === null ? last : Math.max(at.indexOf(this.cursor.at), 0);
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowUp: now + 1,
      PageDown: now - 12, PageUp: now + 12, Home: 0, End: last };
    if (event.key === "Escape") this.cursor.set(null);
    else if (event.key in moves) this.cursor.set(at[Math.min(Math.max(moves[event.key], 0), last)]);
    else return;
    event.preventDefault();
  }
}

function key(name, index) {
  return el("span", { class: "chart-key" },
    svg("svg", { "aria-hidden": "true", viewBox: "0 0 16 8" }, svg("path", { class: `line-${index}`, d: "M0 4H16" })), name);
}

/** "1.50 s" as "1.5 s": the labels of an axis are round. */
const round = (label) => label.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");

/** The newest step with any value; -1: none. */
function latest(lines) {
  for (let step = lines[0].length - 1; step >= 0; step -= 1) {
    if (lines.some((line) => line[step] !== null)) return step;
  }
  return -1;
}

/** Two to four round numbers that span the values. */
export function axis(values, { floor, ceiling, least }) {
  const low = Math.min(floor, ...values);
  const high = ceiling ?? Math.max(low + least, ...values);
  const span = high - low || 1;
  const raw = span / 3;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
  const bottom = Math.floor(low / step) * step;
  const ticks = [];
  for (let tick = bottom; tick < high + step * 0.999; tick += step) ticks.push(Number(tick.toPrecision(12)));
  if (ceiling !== null) return { ticks: [floor, (floor + ceiling) / 2, ceiling], scale: [floor, ceiling] };
  return { ticks, scale: [ticks[0], ticks.at(-1)] };
}
