// The blocks of a prompt, coloured by who holds them. Caches are matched from the beginning of a prompt, so whoever holds
// a block holds all before it: a prompt is a few runs of blocks with the same holders each.

import { el, property } from "./dom.js";
import { count, integer, list } from "./format.js";

const SHADES = 4;
const LETTERED = 0.025; // share of the bar from which a run has room for its letter

/**
 * The bar with its legend, which says in words all that the bar shows. `runs`: `[{from, to, workers, holders}]`, `to`
 * excluded; `workers` are the names of the first of so many `holders`. `candidates`: how many there are.
 */
export function blockBar({ runs, candidates, blocks, tokens }) {
  const bar = el("div", { class: "runs", "aria-hidden": "true" });
  const legend = el("ul", { class: "legend runs-legend" });
  runs.forEach((run, index) => {
    const [letter, shade, words] = [letterOf(index), shadeOf(run, index), runWords(run, candidates)];
    const room = (run.to - run.from) / blocks > LETTERED;
    const segment = el("span", { "data-shade": shade, title: words }, room && letter);
    property(segment, "--length", run.to - run.from);
    bar.append(segment);
    legend.append(el("li", {}, el("i", { "data-shade": shade, "aria-hidden": "true" }, letter), el("span", {}, words)));
  });
  const size = tokens === null ? count(blocks, "block") : `${count(blocks, "block")}, ${count(tokens, "token")}`;
  return el("div", {}, bar, el("p", { class: "runs-scale aside" }, el("span", {}, "first block"), el("span", {}, size)), legend);
}

/** The prompt itself, each block in the colour of its run. `texts` may be those of the first blocks only. */
export function blockTexts({ runs, blocks, texts }) {
  const body = el("div", { class: "prompt", tabindex: "0", role: "region", "aria-label": "The prompt, block by block" });
  runs.forEach((run, index) => {
    for (let block = run.from; block < Math.min(run.to, texts.length); block += 1) {
      const text = texts[block];
      body.append(el("span", { "data-shade": shadeOf(run, index), title: `Block ${integer(block + 1)}, ${letterOf(index)}` }, text));
    }
  });
  const left = blocks - texts.length;
  return el("details", {}, el("summary", {}, "The prompt, block by block"),
    el("p", { class: "aside" }, "As the engine reads it, with chat template and special tokens. A character that two blocks share is shown as \uFFFD."),
    body, left > 0 && el("p", { class: "aside" }, `${count(left, "further block")} not shown`));
}

const letterOf = (index) => (index < 26 ? String.fromCharCode(65 + index) : "");
const shadeOf = (run, index) => (run.holders === 0 ? "none" : Math.min(index, SHADES - 1) + 1);

function runWords({ from, to, workers, holders }, candidates) {
  const blocks = to - from === 1 ? `Block ${integer(to)}` : `Blocks ${integer(from + 1)} to ${integer(to)}`;
  if (holders === 0) return `${blocks}: held by no worker, to be computed`;
  if (holders === candidates && candidates > 1) return `${blocks}: held by all ${count(candidates, "worker")}`;
  return `${blocks}: held by ${list(workers, 4, holders)}`;
}
