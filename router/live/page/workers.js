// The workers: filtered, sorted, in groups, at the density that keeps them readable.

import { attribute, byId, el, KeyedList, show, text } from "./dom.js";
import { integer } from "./format.js";
import { isPassing, needsAttention } from "./health.js";
import { ProblemList } from "./problems.js";
import { tile, WorkerDialog } from "./tile.js";
import { stateCounts, stateWords, workerState } from "./words.js";

const FULL = 16; // at most so many workers are shown in full by themselves,
const COMPACT = 72; // and so many compactly
const RESORT = 5_000; // ms between two sorts by a figure that changes all the time
const DENSE_REDRAW = 2_000; // ms between two drawings of more tiles than that, as long as only their figures change
const MARGIN = 500; // ms by which the update that is waited for may come early or late

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
    const open = (url) => this.#dialog.open(url, this.#live);
    const problems = new ProblemList(`${title}: problems`, (url) => group.tiles.row(url)?.find());
    const node = el("div", { class: "group", "data-group": key }, el("div", { class: "group-head" }, heading, aside), problems.node, list);
    const group = { node, aside, list, holds, key, problems, density: "full", look: "", drawnAt: -Infinity, redraw: 0 };
    group.tiles = new KeyedList(list, () => tile(group.density, open));
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
    let left = shown;
    for (const group of this.#groups) {
      const members = left.filter(group.holds);
      left = left.filter((worker) => !group.holds(worker));
      this.#renderGroup(group, members, shown.length);
    }
    text(byId("workers-aside"), shown.length === all.length ? integer(all.length) : `${integer(shown.length)} of ${integer(all.length)}`);
    show(byId("workers-none"), shown.length === 0);
    show(byId("workers-toolbar"), all.length > 1 || shown.length === 0);
  }

  #renderGroup(group, members, shown) {
    show(group.node, members.length > 0);
    const density = this.#densityOf(group.key, members.length, shown);
    if (density !== group.density) {
      group.density = density;
      group.tiles.clear();
      group.look = "";
    }
    attribute(group.list, "class", `tiles ${density}`);
    this.#renderTiles(group, members);
    group.problems.render(density === "full" ? [] : members); // a full tile has room for them
    text(group.aside, group.key === "attention" && members.length > 1 ? stateWords(members) : integer(members.length));
  }

  /** Hundreds of tiles follow their figures at half the pace, for half the work; a state, an order or a choice shows at once. */
  #renderTiles(group, members) {
    clearTimeout(group.redraw);
    const look = members.map((worker) => `${worker.url} ${workerState(worker).name}`).join();
    const left = group.density === "dense" && look === group.look ? group.drawnAt + DENSE_REDRAW - performance.now() : 0;
    const draw = () => {
      group.tiles.render(members, (worker) => worker.url);
      group.look = look;
      group.drawnAt = performance.now();
    };
    if (left > MARGIN) group.redraw = setTimeout(draw, left + MARGIN);
    else draw();
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
    const states = stateCounts(all);
    const key = JSON.stringify(states);
    if (key === this.#states) return;
    this.#states = key;
    const chosen = this.#state.value;
    if (chosen !== "" && states.every(({ name }) => name !== chosen)) states.push({ name: chosen, number: 0 });
    this.#state.replaceChildren(
      el("option", { value: "" }, `All (${integer(all.length)})`),
      ...states.map(({ name, number }) => el("option", { value: name }, `${name} (${integer(number)})`)));
    this.#state.value = chosen;
  }
}
