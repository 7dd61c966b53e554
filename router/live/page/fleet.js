// Figures, charts and routers.

import { Chart, Cursor, spanOf } from "./chart.js";
import { attribute, byId, el, icon, KeyedList, show, text } from "./dom.js";
import { age, compact, count, decimal, integer, NONE, percent, seconds } from "./format.js";
import { queueRow, queuesWords } from "./queues.js";
import { confirmedWords, routerState } from "./words.js";

const CHARTS = [
  { title: "Hit rate", series: [{ key: "hit_rate" }], format: (value) => percent(value, value > 0 && value < 0.1 ? 1 : 0), ceiling: 1,
    empty: "No answer has reported cached tokens yet" },
  { title: "TTFT", name: "Time to first token", series: [{ name: "p50", key: "ttft_p50" }, { name: "p95", key: "ttft_p95" }], format: seconds,
    least: 0.001, empty: "No streamed answer yet" },
  { title: "TPOT", name: "Time per output token", series: [{ name: "p50", key: "tpot_p50" }, { name: "p95", key: "tpot_p95" }], format: seconds,
    least: 0.001, empty: "No streamed answer of two tokens yet" },
  { title: "Load skew", series: [{ key: "load_skew" }], format: decimal, floor: 1, least: 1, empty: "No requests in flight yet" },
  { title: "Requests / s", name: "Requests per second", series: [{ key: "requests_per_second" }], format: decimal, least: 1, empty: "No requests yet" },
  { title: "Prefill saved / s", name: "Prefill saved per second", series: [{ key: "saved_per_second" }], format: seconds, least: 0.001,
    empty: "Nothing has been found in a cache yet" },
];

export class FleetView {
  #cursor = new Cursor();
  #charts = CHARTS.map((options) => new Chart(options, this.#cursor));
  #totals = new Map();
  #routers = new KeyedList(byId("routers"), routerRow);
  #queues = new KeyedList(byId("queues"), queueRow);
  #drawn = -1;

  constructor() {
    byId("charts").append(...this.#charts.map((chart) => chart.node));
  }

  render(live) {
    this.#renderTotals(live);
    this.#renderQueues(live.queues);
    this.#renderRouters(live.routers);
    if (this.#drawn !== live.historyVersion) {
      this.#drawn = live.historyVersion;
      const history = { ...live.history, saved_per_second: perSecond(live.history) };
      for (const chart of this.#charts) chart.render(history);
      text(byId("charts-title"), `Last ${spanOf(live.history) / 60} minutes`);
      text(byId("charts-aside"), live.history.at.length > 0 ? `in steps of ${age(live.history.step_seconds)}` : "");
    }
  }

  #renderTotals({ totals, workers }) {
    const all = [...workers.values()];
    const ready = all.filter((worker) => worker.ready).length;
    const matched = all.filter((worker) => worker.ready && worker.trust !== "none").length;
    const running = sum(all, "running");
    const waiting = sum(all, "waiting");
    this.#total("Workers ready", `${integer(ready)} of ${integer(all.length)}`, ready > 0 && ready === matched ? "all matched by cache" : `${integer(matched)} matched by cache`);
    this.#total("Hit rate", percent(totals.hit_rate), `${compact(totals.cached_tokens)} of ${compact(totals.prompt_tokens)} tokens cached`);
    this.#total("Prefill saved", seconds(totals.prefill_seconds_saved), "GPU time, since the start");
    this.#total("GPUs saved", decimal(totals.gpus_saved), "more needed without caches");
    this.#total("Running + waiting", running === null ? NONE : `${integer(running)} + ${integer(waiting)}`, "as engines report");
    this.#total("Requests", compact(totals.requests), totals.errors > 0 ? `${count(totals.errors, "error")}, ${percent(totals.errors / Math.max(totals.requests, totals.errors))}` : `no errors in ${age(totals.since_seconds)}`, totals.errors > 0);
  }

  #total(name, figure, aside, bad = false) {
    let total = this.#totals.get(name);
    if (total === undefined) {
      total = { figure: el("dd", { class: "figure" }), aside: el("dd", { class: "aside" }) };
      byId("totals").append(el("div", {}, el("dt", {}, name), total.figure, total.aside));
      this.#totals.set(name, total);
    }
    text(total.figure, figure);
    text(total.aside, aside);
    total.aside.classList.toggle("bad", bad);
  }

  /** Where no router holds requests back, there is nothing to say of it. */
  #renderQueues(queues) {
    show(byId("queues-section"), queues.length > 0);
    text(byId("queues-aside"), queuesWords(queues));
    this.#queues.render(queues, (queue) => queue.name);
  }

  #renderRouters(routers) {
    this.#routers.render(routers, (router) => router.name + router.url);
    const serving = routers.filter((router) => routerState(router).tone === "good").length;
    text(byId("routers-aside"), routers.length > 1 ? `${serving} of ${routers.length} serving; figures are sums over all of them` : "");
  }
}

/** The sum of a field, of the items that have it; null: none has. */
function sum(items, field) {
  const values = items.map((item) => item[field]).filter((value) => value !== null);
  return values.length === 0 ? null : values.reduce((a, b) => a + b, 0);
}

const perSecond = (history) =>
  history.prefill_seconds_saved.map((value) => (value === null ? null : value / history.step_seconds));

function routerRow() {
  const state = el("span", { class: "state" });
  const name = el("h3");
  const facts = el("p", { class: "tabular" });
  const problem = el("p", { class: "problem" });
  const node = el("li", { class: "router" }, state, name, facts, problem);
  let shown = null;
  const update = (router) => {
    const now = routerState(router);
    if (shown !== now) {
      state.replaceChildren(icon(now.icon), now.name);
      state.className = `state tone-${now.tone}`;
      attribute(node, "data-tone", now.tone);
      shown = now;
    }
    text(name, router.name);
    attribute(name, "title", router.url || null);
    const { discovery } = router;
    const confirmed = discovery === null || discovery.age_seconds === null ? "" : `, ${confirmedWords(discovery.age_seconds)}`;
    text(facts, [
      router.strategy,
      router.uptime_seconds === null ? "" : `up ${age(router.uptime_seconds)}`,
      router.tokenizer === "" ? "" : `tokenizer ${router.tokenizer}`,
      discovery === null ? "" : `workers from ${discovery.source}${confirmed}`,
    ].filter(Boolean).join(" · "));
    text(problem, [router.reason, discovery?.error].filter(Boolean).join("; "));
    show(problem, problem.textContent !== "");
  };
  return { node, update };
}
