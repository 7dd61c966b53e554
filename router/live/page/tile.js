// One worker: as a tile, and in full in a dialog.

import { attribute, byId, el, fillMeter, icon, meter, nameLabel, show, text } from "./dom.js";
import { age, compact, decimal, integer, NONE, percent } from "./format.js";
import { viewWords, workerState } from "./words.js";

/**
 * A tile of a density: `full`, `compact` or `dense`. `open(url)` opens its worker.
 * It has only the elements that its density shows: 500 tiles change every second.
 */
export function tile(density, open) {
  const state = el("span", { class: "state" });
  const name = el("button", { type: "button" });
  const body = density === "full" ? fullBody() : smallBody(density);
  const problem = el("p", { class: "tile-problem" });
  const advice = el("p", { class: "tile-advice" });
  const node = el("li", { class: "tile" },
    el("div", { class: "tile-head" }, state, el("h4", { class: "tile-name" }, name)), ...body.nodes,
    density !== "dense" && problem, density === "full" && advice);
  let worker = null;
  let shownState = null;
  name.addEventListener("click", () => open(worker.url));

  const update = (next) => {
    if (next === worker) return;
    worker = next;
    const now = workerState(worker);
    if (now !== shownState) {
      state.replaceChildren(icon(now.icon), el("span", {}, now.name));
      state.className = `state tone-${now.tone}`;
      attribute(node, "data-tone", now.tone);
      shownState = now;
    }
    nameLabel(name, worker.worker_id);
    body.update(worker);
    text(problem, worker.problem ?? "");
    text(advice, now.advice);
    show(problem, worker.problem !== null);
    show(advice, now.advice !== "");
  };

  /** Leads to it: it is marked until the focus goes elsewhere. */
  const find = () => {
    attribute(node, "data-found", true);
    name.addEventListener("blur", () => attribute(node, "data-found", null), { once: true });
    name.focus({ preventScroll: true });
    node.scrollIntoView({ block: "center" });
  };
  return { node, update, find };
}

function fullBody() {
  const where = el("p", { class: "tile-where" });
  const load = facts("tile-load", ["Running", "Waiting", "In flight"]);
  const [fill, blocks, bar] = [el("strong"), el("span"), meter("div")];
  const lately = facts("tile-facts", ["Hit rate", "Reuse", "View"]);
  const nodes = [where, load.node, el("div", { class: "tile-cache" }, el("span", {}, "Cache ", fill), blocks, bar), lately.node];
  const update = (worker) => {
    const { pod, url, worker_id: id } = worker;
    text(where, [pod === id ? "" : pod, url === id ? "" : url].filter(Boolean).join(" · "));
    load.set(integer(worker.running), integer(worker.waiting), integer(worker.in_flight));
    text(fill, percent(worker.cache_fill, 0));
    text(blocks, worker.capacity > 0 ? `${compact(worker.blocks)} of ${compact(worker.capacity)} blocks` : `${compact(worker.blocks)} blocks`);
    fillMeter(bar, worker.cache_fill);
    lately.set(percent(worker.hit_rate, 0), compact(Math.round(worker.reuse_score)), view(worker));
  };
  return { nodes, update };
}

function smallBody(density) {
  const [queue, hits, fill, bar] = [el("span"), el("span"), el("span"), meter("div")];
  const full = el("span", { class: density === "dense" ? "hidden-text" : null }, " full");
  const nodes = [el("p", { class: "tile-line" }, queue, density === "compact" && hits, el("span", {}, fill, full)), bar];
  const update = (worker) => {
    text(queue, worker.running === null ? "no report" : worker.waiting > 0 ? `${worker.running} + ${worker.waiting} wait` : `${worker.running} run`);
    text(hits, worker.hit_rate === null ? "" : `hit ${percent(worker.hit_rate, 0)}`);
    text(fill, percent(worker.cache_fill, 0));
    fillMeter(bar, worker.cache_fill);
  };
  return { nodes, update };
}

const view = (worker) => (worker.view_age_seconds === null ? "none" : `${worker.trust === "exact" ? "" : `${worker.trust} · `}${age(worker.view_age_seconds)}`);

function facts(className, names) {
  const values = names.map(() => el("dd"));
  const node = el("dl", { class: className }, ...names.map((name, index) => el("div", {}, el("dt", {}, name), values[index])));
  return { node, set: (...texts) => texts.forEach((value, index) => text(values[index], value)) };
}

/** The dialog with everything about one worker, live while it is open. `decisionsOf(worker)` shows its decisions. */
export class WorkerDialog {
  #dialog = byId("worker");
  #url = null;
  #parts = null;

  constructor(decisionsOf) {
    this.decisionsOf = decisionsOf;
    this.#dialog.addEventListener("close", () => (this.#url = null));
    this.#dialog.addEventListener("click", (event) => event.target === this.#dialog && this.#dialog.close());
  }

  open(url, live) {
    this.#url = url;
    this.#build();
    this.render(live);
    this.#dialog.showModal();
  }

  #build() {
    const parts = (this.#parts = {
      title: el("h2", { id: "worker-title" }),
      state: el("p", { class: "state" }),
      problem: el("div", { class: "worker-problem" }),
      facts: new Map(),
      list: el("dl", { class: "worker-facts" }),
      meter: meter(),
      fill: el("span"),
    });
    const decisions = el("button", { type: "button", onclick: () => {
      this.#dialog.close();
      this.decisionsOf(parts.title.textContent);
    } }, "Its decisions");
    const close = el("button", { type: "button", class: "quiet-button", "aria-label": "Close", onclick: () => this.#dialog.close() }, icon("close"));
    this.#dialog.replaceChildren(
      el("div", { class: "worker-head" }, el("div", {}, parts.title, parts.state), decisions, close),
      el("div", { class: "worker-body" }, parts.problem, parts.list));
    this.#fact("Cache", parts.meter, parts.fill);
  }

  #fact(name, ...children) {
    const { facts: known, list } = this.#parts;
    if (!known.has(name)) {
      const value = el("dd", {}, ...children);
      known.set(name, value);
      list.append(el("dt", {}, name), value);
    }
    return known.get(name);
  }

  render(live) {
    if (this.#url === null) return;
    const worker = live.workers.get(this.#url);
    const parts = this.#parts;
    if (worker === undefined) {
      text(parts.state, "It has left.");
      return;
    }
    const now = workerState(worker);
    text(parts.title, worker.worker_id);
    if (parts.state.textContent !== now.name) parts.state.replaceChildren(icon(now.icon), now.name);
    parts.state.className = `state tone-${now.tone}`;
    const lines = [worker.problem, now.advice].filter(Boolean);
    if (parts.problem.textContent !== lines.join("")) parts.problem.replaceChildren(...lines.map((line) => el("p", {}, line)));
    attribute(parts.problem, "data-tone", now.tone);
    show(parts.problem, lines.length > 0);
    fillMeter(parts.meter, worker.cache_fill);
    const size = worker.capacity > 0 ? ` of ${integer(worker.capacity)}` : "";
    text(parts.fill, `${percent(worker.cache_fill)}, ${integer(worker.blocks)}${size} blocks`);
    const rows = {
      "View of its cache": viewWords(worker),
      "Running": `${integer(worker.running)}, and ${integer(worker.waiting)} waiting, by its own last report`,
      "In flight": `${integer(worker.in_flight)} of these routers' requests`,
      "Hit rate": `${percent(worker.hit_rate)} of the prompt tokens sent there`,
      "Reuse score": `${decimal(worker.reuse_score)} blocks, those of 10 minutes ago counted half`,
      "Requests": integer(worker.requests),
      "URL": worker.url,
      "Pod": worker.pod || NONE,
    };
    for (const [name, value] of Object.entries(rows)) text(this.#fact(name), value);
  }
}
