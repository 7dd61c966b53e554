// Requests that wait in the routers, by class (flow control).

import { attribute, el, fillMeter, meter, text } from "./dom.js";
import { count, integer, NONE, seconds } from "./format.js";

/** What all classes amount to, in a sentence. */
export function queuesWords(queues) {
  const waiting = sum(queues, "waiting");
  const held = sum(queues, "held");
  if (waiting === 0) return "Nothing waits: workers have room";
  if (held === waiting) return `${requests(held, "waits", "wait")} for a worker to become ready`;
  const part = held > 0 ? `, ${integer(held)} of them for one to become ready` : "";
  return `${requests(waiting, "waits", "wait")} for room on a worker${part}`;
}

const requests = (number, one, more) => `${count(number, "request")} ${number === 1 ? one : more}`;
const sum = (queues, field) => queues.reduce((all, queue) => all + queue[field], 0);

/** A row of the table. The bar beside the figure fills with how many wait, and is full from a hundred on. */
export function queueRow() {
  const name = el("th", { scope: "row" });
  const priority = el("td", { class: "number priority" });
  const figure = el("span");
  const bar = meter();
  const waiting = el("td", { class: "number waiting" }, bar, figure);
  const oldest = el("td", { class: "number" });
  const shed = el("td", { class: "number" });
  const node = el("tr", {}, name, priority, waiting, oldest, shed);
  const update = (queue) => {
    text(name, queue.name);
    text(priority, integer(queue.priority).replace("-", "−"));
    text(figure, integer(queue.waiting));
    fillMeter(bar, share(queue.waiting));
    text(oldest, queue.oldest_seconds === null ? NONE : seconds(queue.oldest_seconds));
    text(shed, integer(queue.shed));
    attribute(node, "data-waits", queue.waiting > 0);
    shed.classList.toggle("bad", queue.shed > 0);
  };
  return { node, update };
}

const MANY = 100;

/** By its logarithm: one request is to be seen, and a thousand to fit. */
const share = (waiting) => Math.min(1, Math.log1p(waiting) / Math.log1p(MANY));
