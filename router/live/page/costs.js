// What a request would cost on a worker: queue, load, prefill, decode and charge, as a stacked bar and in words.

import { el, property } from "./dom.js";
import { seconds } from "./format.js";
import { COSTS } from "./words.js";

/** The parts of a candidate's or decision's cost: `[{key, name, seconds}]`, in the order in which they are drawn. */
export const costParts = (item) => COSTS.map(([key, name]) => ({ key, name, seconds: item[`${key}_seconds`] ?? 0 }));

/**
 * A stacked bar. `scale` is `{low, high}` in seconds, the same for the bars of one picture; null: the bar is as long as
 * its own parts. A negative part is drawn to the left of zero.
 */
export function costBar(item, scale) {
  const parts = costParts(item);
  const positive = parts.filter((part) => part.seconds > 0);
  const total = positive.reduce((sum, part) => sum + part.seconds, 0);
  const { low, high } = scale ?? { low: 0, high: total };
  const span = high - low || 1;
  const bar = el("div", { class: "stack", role: "img", "aria-label": costWords(item), title: costWords(item) });
  const draw = (part, from, length) => {
    const segment = el("i", { "data-part": part.key });
    property(segment, "--from", `${((from - low) / span) * 100}%`);
    property(segment, "--length", `${(length / span) * 100}%`);
    bar.append(segment);
  };
  let at = 0;
  for (const part of positive) {
    draw(part, at, part.seconds);
    at += part.seconds;
  }
  if (scale !== null) {
    if (low < 0) draw({ key: "zero" }, 0, 0);
    let below = 0;
    for (const part of parts.filter((each) => each.seconds < 0)) {
      below += part.seconds;
      draw(part, below, -part.seconds);
    }
  }
  return bar;
}

/** "queue 2 ms, prefill 30 ms" */
export function costWords(item) {
  const parts = costParts(item).filter((part) => part.seconds !== 0);
  return parts.length === 0 ? "no cost" : parts.map((part) => `${part.name.toLowerCase()} ${seconds(part.seconds)}`).join(", ");
}

/** The extent that holds the bars of all these candidates. */
export function costScale(items) {
  let [low, high] = [0, 0];
  for (const item of items) {
    const parts = costParts(item).map((part) => part.seconds);
    high = Math.max(high, parts.filter((value) => value > 0).reduce((a, b) => a + b, 0));
    low = Math.min(low, parts.filter((value) => value < 0).reduce((a, b) => a + b, 0));
  }
  return { low, high };
}

/** What the colours of the bars mean, of the parts that occur; `brief`: their names alone. */
export function costLegend(items, brief = false) {
  const used = COSTS.filter(([key]) => items.some((item) => (item[`${key}_seconds`] ?? 0) !== 0));
  return el("ul", { class: "legend" }, ...used.map(([key, name, what]) =>
    el("li", { title: brief ? what : null }, el("i", { "data-part": key }), el("span", {}, brief ? name : el("strong", {}, name), !brief && ` ${what}`))));
}
