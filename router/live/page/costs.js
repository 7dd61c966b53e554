// What a request would cost on a worker: queue, load, prefill, decode and charge, as a stacked bar and in words.

import { el, property } from "./dom.js";
import { seconds } from "./format.js";
import { COSTS } from "./words.js";

/** The parts of a candidate's or decision's cost: `[{key, name, seconds}]`, in the order in which they are drawn. */
export const costParts = (item) => COSTS.map(([key, name]) => ({ key, name, seconds: item[`${key}_seconds`] ?? 0 }));

/**
 * A stacked bar. It is drawn to the scale of the element around it (`scaleCosts`); a negative part is to the left of zero.
 */
export function costBar(item) {
  const words = costWords(item);
  const bar = el("div", { class: "stack", role: "img", "aria-label": words, title: words });
  const draw = (key, from, length) => {
    const segment = el("i", { "data-part": key });
    property(segment, "--from", from);
    property(segment, "--length", length);
    bar.append(segment);
  };
  let [above, below] = [0, 0];
  for (const part of costParts(item)) {
    if (part.seconds > 0) {
      draw(part.key, above, part.seconds);
      above += part.seconds;
    } else if (part.seconds < 0) {
      below += part.seconds;
      draw(part.key, below, -part.seconds);
    }
  }
  if (below < 0) draw("zero", 0, 0);
  return bar;
}

/** "queue 2 ms, prefill 30 ms" */
export function costWords(item) {
  const parts = costParts(item).filter((part) => part.seconds !== 0);
  return parts.length === 0 ? "no cost" : parts.map((part) => `${part.name.toLowerCase()} ${seconds(part.seconds)}`).join(", ");
}

/** Sets the scale of all bars in `node`, so that those of all these items fit and can be compared. */
export function scaleCosts(node, items) {
  let [low, high] = [0, 0];
  for (const item of items) {
    const parts = costParts(item).map((part) => part.seconds);
    high = Math.max(high, parts.filter((value) => value > 0).reduce((a, b) => a + b, 0));
    low = Math.min(low, parts.filter((value) => value < 0).reduce((a, b) => a + b, 0));
  }
  property(node, "--low", low);
  property(node, "--high", high || 1);
}

/** What the colours of the bars mean, of the parts that occur; `brief`: their names alone. */
export function costLegend(items, brief = false) {
  const used = COSTS.filter(([key]) => items.some((item) => (item[`${key}_seconds`] ?? 0) !== 0));
  return el("ul", { class: "legend" }, ...used.map(([key, name, what]) =>
    el("li", { title: brief ? what : null }, el("i", { "data-part": key }), el("span", {}, brief ? name : el("strong", {}, name), !brief && ` ${what}`))));
}
