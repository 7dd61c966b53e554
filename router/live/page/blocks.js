// The blocks of a prompt, coloured by who holds them. Caches are matched from the beginning of a prompt, so whoever holds
// a block holds all before it: a prompt is a few runs of blocks with the same holders each.

import { el, property } from "./dom.js";
import { count, integer, list } from "./format.js";

const SHADES = 4;

/**
 * Runs of blocks with the same holders: `[{from, to, holders}]`, `to` excluded, names of workers by their order in
 * `candidates`. The last run may have no holders.
 */
export function runsOf(candidates, blocks) {
  const depths = [...new Set(candidates.map((candidate) => candidate.matched_blocks))].filter((depth) => depth > 0);
  depths.sort((a, b) => a - b);
  const runs = [];
  let from = 0;
  for (const depth of depths) {
    const to = Math.min(depth, blocks);
    if (to > from) {
      const holders = candidates.filter((candidate) => candidate.matched_blocks >= depth);
      runs.push({ from, to, holders: holders.map((candidate) => candidate.worker_id) });
    }
    from = Math.max(from, to);
  }
  if (from < blocks) runs.push({ from, to: blocks, holders: [] });
  return runs;
}

/** The bar with its legend. The legend says in words all that the bar shows. */
export function blockBar(candidates, blocks, tokens) {
  const runs = runsOf(candidates, blocks);
  const bar = el("div", { class: "runs", "aria-hidden": "true" });
  const legend = el("ul", { class: "legend runs-legend" });
  runs.forEach((run, index) => {
    const letter = index < 26 ? String.fromCharCode(65 + index) : "";
    const shade = run.holders.length === 0 ? "none" : Math.min(index, SHADES - 1) + 1;
    const segment = el("span", { "data-shade": shade, title: runWords(run, candidates.length) }, (run.to - run.from) / blocks > 0.025 && letter);
    property(segment, "--length", run.to - run.from);
    bar.append(segment);
    legend.append(el("li", {}, el("i", { "data-shade": shade, "aria-hidden": "true" }, letter), el("span", {}, runWords(run, candidates.length))));
  });
  const scale = el("p", { class: "runs-scale aside" }, el("span", {}, "first block"),
    el("span", {}, tokens === null ? count(blocks, "block") : `${count(blocks, "block")}, ${count(tokens, "token")}`));
  return el("div", {}, bar, scale, legend);
}

function runWords({ from, to, holders }, candidates) {
  const blocks = to - from === 1 ? `Block ${integer(to)}` : `Blocks ${integer(from + 1)} to ${integer(to)}`;
  if (holders.length === 0) return `${blocks}: held by no worker, to be computed`;
  if (holders.length === candidates && candidates > 1) return `${blocks}: held by all ${count(candidates, "worker")}`;
  return `${blocks}: held by ${list(holders)}`;
}
