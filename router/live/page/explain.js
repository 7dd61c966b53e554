// "Why would this prompt go there?": asks POST route/explain and shows the answer.

import { blockBar, blockTexts } from "./blocks.js";
import { costBar, costLegend, costParts, scaleCosts } from "./costs.js";
import { attribute, byId, el, fillMeter, icon, meter, show, text } from "./dom.js";
import { credentials } from "./events.js";
import { count, integer, NONE, seconds } from "./format.js";
import { COSTS, reasonWords, stateName, UNREAD } from "./words.js";

const SHOWN = 12; // candidates until all are asked for
const ENDPOINT = "route/explain";

export class ExplainView {
  #form = byId("explain-form");
  #result = byId("explain-result");
  #submit = byId("explain-submit");
  #asked = 0;

  /** `announce(text)` tells a screen reader. */
  constructor(announce) {
    this.announce = announce;
    this.#form.addEventListener("input", () => this.#kind());
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    this.#form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.#form.requestSubmit();
      }
    });
    this.#kind();
    this.#result.append(el("p", { class: "nothing" },
      "The answer appears here: which blocks of the prompt are cached and where, and what each worker would cost."));
  }

  #kind() {
    const kind = new FormData(this.#form).get("kind");
    for (const part of this.#form.querySelectorAll("[data-kind]")) show(part, part.dataset.kind.split(" ").includes(kind));
  }

  /** `{path, body}`, body as text. Throws an error whose message says what to do. */
  #request() {
    const kind = new FormData(this.#form).get("kind");
    if (kind === "json") {
      const body = byId("explain-json").value;
      try {
        const fields = JSON.parse(body);
        if (typeof fields === "object" && fields !== null && !Array.isArray(fields)) return { path: byId("explain-path").value, body };
      } catch (error) {
        throw new Error(`The body is no JSON: ${error.message}`, { cause: error });
      }
      throw new Error("The body is no JSON object: it looks like {\"messages\": [...]}.");
    }
    const most = byId("explain-max").valueAsNumber;
    const fields = { stream: byId("explain-stream").checked };
    if (Number.isFinite(most)) fields.max_tokens = most;
    if (byId("explain-model").value.trim() !== "") fields.model = byId("explain-model").value.trim();
    if (kind === "text") return { path: "/v1/completions", body: JSON.stringify({ ...fields, prompt: byId("explain-text").value }) };
    const messages = [];
    if (byId("explain-system").value !== "") messages.push({ role: "system", content: byId("explain-system").value });
    messages.push({ role: "user", content: byId("explain-user").value });
    return { path: "/v1/chat/completions", body: JSON.stringify({ ...fields, messages }) };
  }

  async #ask() {
    const number = (this.#asked += 1);
    attribute(this.#submit, "aria-disabled", "true");
    text(this.#submit, "Explaining …");
    let shown;
    try {
      const { path, body } = this.#request();
      const response = await fetch(`${ENDPOINT}?path=${encodeURIComponent(path)}`, { method: "POST", body, headers: { "content-type": "application/json", ...credentials() } });
      const answer = await response.json().catch(() => null);
      if (!response.ok) throw new Error(answer?.error?.message ?? `The router answers ${response.status} ${response.statusText}.`);
      if (!Array.isArray(answer?.candidates) || !Array.isArray(answer.blocks?.runs)) throw new Error("The router gives another answer than this page knows: reload the page.");
      shown = explained(answer);
    } catch (error) {
      shown = failure(error instanceof TypeError ? "The router cannot be reached. Try again when the page is connected." : error.message);
    }
    if (number !== this.#asked) return; // a later question was faster
    this.#result.replaceChildren(...shown.nodes);
    this.announce(shown.summary);
    attribute(this.#submit, "aria-disabled", null);
    text(this.#submit, "Explain");
    if (this.#result.getBoundingClientRect().top > window.innerHeight * 0.8) this.#result.scrollIntoView({ block: "start" });
  }
}

function failure(message) {
  const node = el("section", { class: "notice", "data-level": "lost" }, icon("unreachable"),
    el("div", {}, el("h3", {}, "No decision"), el("p", {}, message)));
  return { nodes: [node], summary: `No decision: ${message}` };
}

/** A candidate with the parts of its cost as `costParts` reads them. */
const priced = (candidate) => ({
  ...candidate,
  ...Object.fromEntries(Object.entries(candidate.cost_parts).map(([part, value]) => [`${part}_seconds`, value])),
});

function explained({ decision, candidates, blocks: { runs, texts }, left_out: leftOut }) {
  const all = candidates.map(priced).sort((a, b) => (b.url === decision.url) - (a.url === decision.url) || a.cost - b.cost);
  const why = reasonWords(decision.reason);
  const blocks = decision.prompt_blocks;
  const facts = [];
  if (blocks > 0) facts.push(`It holds ${integer(decision.matched_blocks)} of the prompt's ${count(blocks, "block")}.`);
  facts.push(`First token expected after ${seconds(decision.predicted_ttft)}.`);
  const others = all.slice(1);
  if (others.length > 0) {
    const next = others[0];
    const more = next.cost - all[0].cost;
    facts.push(more >= 0.00005 ? `${next.worker_id} would cost ${seconds(more)} more.` : more <= -0.00005
      ? `${next.worker_id} would cost ${seconds(-more)} less.` : `${next.worker_id} would cost the same.`);
  }
  const nodes = [el("section", { class: "verdict" },
    el("h3", {}, el("span", { class: "aside" }, "It would go to "), el("strong", {}, decision.worker_id)),
    el("p", {}, `Because ${why}.`), el("p", { class: "aside" }, facts.join(" ")),
    decision.strategy !== "cache_aware" && el("p", { class: "aside" }, `Strategy ${decision.strategy} does not compare these costs; they are what they would be.`),
    decision.unread && el("p", { class: "worker-problem", "data-tone": "warn" }, UNREAD[decision.unread] ?? `The prompt was not read: ${decision.unread}.`))];
  if (blocks > 0) {
    nodes.push(el("section", { class: "panel" }, el("h3", {}, "Its blocks, by who holds them"),
      blockBar({ runs, blocks, candidates: all.length, tokens: decision.prompt_tokens }),
      texts !== null && texts.length > 0 && blockTexts({ runs, blocks, texts })));
  }
  nodes.push(candidatesPanel(all, decision, blocks));
  if (leftOut.length > 0) nodes.push(leftOutPanel(leftOut));
  return { nodes, summary: `It would go to ${decision.worker_id}, because ${why}. ${facts.join(" ")}` };
}

function candidatesPanel(all, decision, blocks) {
  const body = el("tbody");
  scaleCosts(body, all);
  const columns = COSTS.filter(([key]) => key !== "load" || all.some((candidate) => candidate.load_seconds !== 0));
  const draw = (number) => body.replaceChildren(...all.slice(0, number).map((candidate) => candidateRow(candidate, decision, blocks, columns)));
  draw(SHOWN);
  const head = el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Worker"), el("th", { scope: "col" }, "Holds"),
    el("th", { scope: "col", class: "wide" }, "Cost by part"), ...columns.map(([, name, what]) => el("th", { scope: "col", class: "number", title: what }, name)),
    el("th", { scope: "col", class: "number" }, "Cost"), el("th", { scope: "col", class: "number" }, "Requests")));
  const table = el("table", {}, el("caption", { class: "hidden-text" }, "Candidates, the chosen one first, then by cost"), head, body);
  const more = all.length > SHOWN && el("button", { type: "button", onclick: (event) => {
    draw(all.length);
    event.target.remove();
  } }, `Show all ${integer(all.length)} candidates`);
  return el("section", { class: "panel" }, el("h3", {}, "What it would cost on each"), costLegend(all),
    el("div", { class: "table", role: "region", tabindex: "0", "aria-label": "Costs of the candidates" }, table), more);
}

function candidateRow(candidate, decision, blocks, columns) {
  const chosen = candidate.url === decision.url;
  const bar = meter();
  fillMeter(bar, blocks > 0 ? candidate.matched_blocks / blocks : 0);
  const parts = new Map(costParts(candidate).map((part) => [part.key, part.seconds]));
  const loaded = Object.entries(candidate.loaded_blocks ?? {}).filter(([, number]) => number > 0);
  return el("tr", { "data-chosen": chosen },
    el("th", { scope: "row" }, el("span", { class: "name" }, candidate.worker_id), " ", chosen && el("span", { class: "badge" }, "Chosen"),
      candidate.why_not_matching && el("span", { class: "note" }, candidate.why_not_matching)),
    el("td", {}, el("span", { class: "holds" }, bar, `${integer(candidate.matched_blocks)} of ${integer(blocks)}`),
      loaded.length > 0 && el("span", { class: "note" }, loaded.map(([tier, number]) => `${integer(number)} from ${tier}`).join(", "))),
    el("td", { class: "wide" }, costBar(candidate)),
    ...columns.map(([key]) => el("td", { class: "number" }, parts.get(key) === 0 ? NONE : seconds(parts.get(key)))),
    el("td", { class: "number total" }, seconds(candidate.cost)),
    el("td", { class: "number" }, integer(candidate.in_flight)));
}

function leftOutPanel(leftOut) {
  return el("section", { class: "panel" }, el("h3", {}, `Left out: ${count(leftOut.length, "worker")}`),
    el("ul", { class: "left-out" }, ...leftOut.slice(0, 50).map((worker) => el("li", {}, el("strong", {}, worker.worker),
      ` ${stateName(worker.state)}: ${worker.why}`,
      worker.seconds_left > 0 && ` (for ${seconds(worker.seconds_left)} more)`))),
    leftOut.length > 50 && el("p", { class: "aside" }, `and ${integer(leftOut.length - 50)} more`));
}
