// The workers: filtered, sorted, in groups, at the density that keeps them readable.

import { attribute, byId, el, KeyedList, show, text } from "./dom.js";
import { count, integer } from "./format.js";
import { isPassing, needsAttention } from "./health.js";
import { tile, WorkerDialog } from "./tile.js";
import { workerState } from "./words.js";

const FULL = 16; // at most so many workers are shown in full by themselves,
const COMPACT = 72; // and so many compactly
const SHORTEN = 3; // characters that all names begin with and that may be left out
const RESORT = 5_000; // ms between two sorts by a figure that changes all the time

const GROUPS = [
  { key: "attention", title: "Needs attention", holds: needsAttention },
  { key: "passing", title: "Starting or leaving", holds: isPassing },
  { key: "serving", title: "Serving", holds: () => true },
];

/** Figures to sort by, the largest first. Workers without a figure come last. */
const FIGURES = {
  load: (worker) => (worker.running === null ? null : worker.running + worker.waiting),
  cache: (worker) => worker.cache_fill,
  hits: (worker) => worker.hit_rate,
  reuse: (worker) => worker.reuse_score,
  age: (worker) => worker.view_age_seconds,
};

const names = new Intl.Collator("en", { numeric: true });

export class WorkersView {
  #filter = byId("workers-filter");
  #state = byId("workers-state");
  #sort = byId("workers-sort");
  #density = byId("workers-density");
  #dialog;
  #groups;
  #live = null;
  #order = new Map(); // by URL: position
  #orderedBy = "";
  #orderedAt = 0;
  #prefix = "";
  #states = "";

  constructor(decisionsOf) {
    this.#dialog = new WorkerDialog(decisionsOf);
    this.#groups = GROUPS.map((group) => this.#group(group));
    byId("groups").append(...this.#groups.map((group) => group.node));
    const changed = () => this.#live !== null && this.render(this.#live);
    for (const control of [this.#filter, this.#state, this.#sort, this.#density]) control.addEventListener("input", changed);
    byId("workers-toolbar").addEventListener("submit", (event) => event.preventDefault());
    byId("workers-clear").addEventListener("click", () => {
      this.#filter.value = "";
      this.#state.value = "";
      changed();
      this.#filter.focus();
    });
  }

  #group({ key, title, holds }) {
    const heading = el("h3", { id: `group-${key}` }, title);
    const aside = el("p", { class: "aside" });
    const list = el("ul", { class: "tiles", "aria-labelledby": heading.id });
    const node = el("div", { class: "group", "data-group": key }, el("div", { class: "group-head" }, heading, aside), list);
    const open = (url) => this.#dialog.open(url, this.#live);
    const group = { node, aside, list, holds, key, density: "full" };
    group.tiles = new KeyedList(list, () => tile(group.density, open, (name) => this.#shortened(name, group.density)));
    return group;
  }

  render(live) {
    this.#live = live;
    const all = [...live.workers.values()];
    show(byId("workers-section"), all.length > 0);
    this.#dialog.render(live);
    if (all.length === 0) return;
    this.#renderStates(all);
    const shown = this.#filtered(all);
    this.#reorder(all);
    shown.sort((a, b) => this.#order.get(a.url) - this.#order.get(b.url));
    this.#prefix = commonPrefix(all.map((worker) => worker.worker_id));
    let left = shown;
    for (const group of this.#groups) {
      const members = left.filter(group.holds);
      left = left.filter((worker) => !group.holds(worker));
      this.#renderGroup(group, members, shown.length);
    }
    const shortened = this.#prefix.length > SHORTEN && this.#groups.some((group) => !group.node.hidden && group.density !== "full");
    text(byId("workers-aside"), [
      shortened ? `“…” stands for ${this.#prefix}` : "",
      shown.length === all.length ? integer(all.length) : `${integer(shown.length)} of ${integer(all.length)}`,
    ].filter(Boolean).join(" · "));
    show(byId("workers-none"), shown.length === 0);
    show(byId("workers-toolbar"), all.length > 1 || shown.length === 0);
  }

  #renderGroup(group, members, shown) {
    show(group.node, members.length > 0);
    const density = this.#densityOf(group.key, members.length, shown);
    if (density !== group.density) {
      group.density = density;
      group.tiles.clear();
    }
    attribute(group.list, "class", `tiles ${density}`);
    group.tiles.render(members, (worker) => worker.url);
    text(group.aside, group.key === "attention" && members.length > 1 ? breakdown(members) : integer(members.length));
  }

  /** Those that need attention are shown in words as long as there are few, however many serve. */
  #densityOf(key, members, shown) {
    const chosen = this.#density.value;
    if (chosen !== "auto") return chosen;
    const number = key === "attention" ? members : shown;
    return number <= FULL ? "full" : number <= COMPACT ? "compact" : "dense";
  }

  #filtered(all) {
    const wanted = this.#filter.value.trim().toLowerCase();
    const state = this.#state.value;
    return all.filter((worker) =>
      (state === "" || workerState(worker).name === state) &&
      (wanted === "" || [worker.worker_id, worker.pod, worker.url].some((name) => name.toLowerCase().includes(wanted))));
  }

  /** Tiles do not jump about: the order by a figure is made anew every few seconds, and not under the pointer. */
  #reorder(all) {
    const by = this.#sort.value;
    const key = `${by} ${all.map((worker) => `${worker.url} ${workerState(worker).rank}`).join()}`;
    const due = by !== "name" && performance.now() - this.#orderedAt > RESORT && !byId("groups").matches(":hover, :focus-within");
    if (key === this.#orderedBy && !due) return;
    const figure = FIGURES[by];
    const compare = (a, b) =>
      workerState(a).rank - workerState(b).rank ||
      (figure ? (figure(b) ?? -1) - (figure(a) ?? -1) : 0) ||
      names.compare(a.worker_id, b.worker_id) || names.compare(a.url, b.url);
    this.#order = new Map(all.sort(compare).map((worker, position) => [worker.url, position]));
    this.#orderedBy = key;
    this.#orderedAt = performance.now();
  }

  #renderStates(all) {
    const counts = new Map();
    for (const worker of all) {
      const { name, rank } = workerState(worker);
      counts.set(name, { rank, number: (counts.get(name)?.number ?? 0) + 1 });
    }
    const states = [...counts].sort(([, a], [, b]) => a.rank - b.rank);
    const key = JSON.stringify(states);
    if (key === this.#states) return;
    this.#states = key;
    const chosen = this.#state.value;
    if (chosen !== "" && !counts.has(chosen)) states.push([chosen, { number: 0 }]);
    this.#state.replaceChildren(
      el("option", { value: "" }, `All (${integer(all.length)})`),
      ...states.map(([name, { number }]) => el("option", { value: name }, `${name} (${integer(number)})`)));
    this.#state.value = chosen;
  }

  /** Where there is little room, what all names begin with is left out. */
  #shortened(name, density) {
    return density !== "full" && this.#prefix.length > SHORTEN ? `…${name.slice(this.#prefix.length)}` : name;
  }
}

/** "3 unreachable, 1 paused" */
function breakdown(members) {
  const counts = new Map();
  for (const worker of members) {
    const { name } = workerState(worker);
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return [...counts].map(([name, number]) => `${integer(number)} ${name.toLowerCase()}`).join(", ");
}

/** What all of these names begin with, up to a separator; at least something is left of each. */
export function commonPrefix(all) {
  if (all.length < 2) return "";
  let prefix = all[0];
  for (const name of all) {
    let same = 0;
    while (same < prefix.length && name[same] === prefix[same]) same += 1;
    prefix = prefix.slice(0, same);
  }
  const end = Math.max(...["-", ".", "/", ":", "_"].map((separator) => prefix.lastIndexOf(separator)));
  prefix = prefix.slice(0, end + 1);
  return all.some((name) => name.length === prefix.length) ? "" : prefix;
}
