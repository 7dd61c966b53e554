// What is wrong with workers, in words, where their tiles have no room for it: one entry for each problem, with how many
// have it, and their names, which lead to the tiles.

import { attribute, el, icon, KeyedList, nameLabel, show, text } from "./dom.js";
import { count, integer } from "./format.js";
import { workerState } from "./words.js";

const NAMED = 4; // names of a problem until all are asked for

/**
 * The problems of these workers, in the order in which the first of each comes: `[{key, state, words, alike, workers}]`.
 * Those whose words differ in numbers only are one problem (`alike` is then false), described by its first worker.
 */
export function problemsOf(workers) {
  const problems = new Map();
  for (const worker of workers) {
    if (worker.problem === null) continue;
    const state = workerState(worker);
    const key = `${state.name} ${worker.problem.replace(/\d+/g, "0")}`;
    const known = problems.get(key);
    if (known === undefined) problems.set(key, { key, state, words: worker.problem, alike: true, workers: [worker] });
    else {
      known.workers.push(worker);
      known.alike &&= worker.problem === known.words;
    }
  }
  return [...problems.values()];
}

/** The list of problems. `find(url)` leads to a worker's tile. */
export class ProblemList {
  node = el("ul", { class: "problems" });
  #rows;

  constructor(name, find) {
    attribute(this.node, "aria-label", name);
    this.#rows = new KeyedList(this.node, () => problemRow(find));
  }

  render(workers) {
    const problems = problemsOf(workers);
    this.#rows.render(problems, (problem) => problem.key);
    show(this.node, problems.length > 0);
  }
}

function problemRow(find) {
  const [state, words, advice, more] = [el("p", { class: "state" }), el("p", { class: "problem-words" }), el("p", { class: "aside" }),
    el("button", { type: "button", class: "link" })];
  const list = el("ul", { class: "problem-workers" });
  const names = new KeyedList(list, (worker) => nameButton(worker, find));
  const node = el("li", {}, state, el("div", {}, words, advice), el("div", {}, list, more));
  let all = false;
  let shown = null;
  more.addEventListener("click", () => {
    all = !all;
    update(shown);
  });

  function update(problem) {
    shown = problem;
    const { state: now, workers } = problem;
    attribute(node, "data-tone", now.tone);
    const label = `${integer(workers.length)} ${now.name.toLowerCase()}`;
    if (state.textContent !== label) state.replaceChildren(icon(now.icon), label);
    attribute(state, "class", `state tone-${now.tone}`);
    text(words, problem.alike ? problem.words : `${problem.words} (${workers[0].worker_id}; the others alike)`);
    text(advice, now.advice);
    const fits = workers.length <= NAMED + 1; // the button would take the place of one
    names.render(all || fits ? workers : workers.slice(0, NAMED), (worker) => worker.url);
    show(more, !fits);
    text(more, all ? "Fewer" : `and ${count(workers.length - NAMED, "more worker")}`);
    attribute(more, "aria-expanded", String(all));
  }
  return { node, update };
}

function nameButton({ url }, find) {
  const button = el("button", { type: "button", class: "link", onclick: () => find(url) });
  return { node: el("li", {}, button), update: (worker) => nameLabel(button, worker.worker_id) };
}
