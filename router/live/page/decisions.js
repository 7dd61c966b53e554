// The stream of decisions: newest first, with reasons. It can be paused and filtered.

import { attribute, byId, el, KeyedList, nameLabel, show, text } from "./dom.js";
import { costBar, costLegend, scaleCosts } from "./costs.js";
import { clock, count, integer, seconds } from "./format.js";
import { REASONS, reasonName, reasonWords } from "./words.js";

const SHOWN = 120;
const BESIDE = 40; // beside the fleet, where each second moves them all

export class DecisionsView {
  #filter = byId("decisions-filter");
  #reason = byId("decisions-reason");
  #pause = byId("decisions-pause");
  #rows = new KeyedList(byId("stream"), row);
  #legend = byId("decisions-legend");
  #paused = null; // the decisions at the time of the pause
  #live = null;
  #drawn = "";

  constructor() {
    this.#reason.append(el("option", { value: "" }, "All reasons"),
      ...Object.keys(REASONS).map((reason) => el("option", { value: reason }, reasonName(reason))));
    const changed = () => this.#live !== null && this.render(this.#live);
    this.#filter.addEventListener("input", changed);
    this.#reason.addEventListener("input", changed);
    byId("decisions-toolbar").addEventListener("submit", (event) => event.preventDefault());
    this.#pause.addEventListener("click", () => {
      this.#paused = this.#paused === null ? (this.#live?.decisions ?? []) : null;
      attribute(this.#pause, "aria-pressed", String(this.#paused !== null));
      attribute(this.#pause.querySelector("use"), "href", this.#paused === null ? "#i-pause" : "#i-play");
      text(this.#pause.querySelector("[data-label]"), this.#paused === null ? "Pause" : "Resume");
      changed();
    });
  }

  #renderLegend(shown) {
    const legend = costLegend(shown, true);
    if (legend.textContent === this.#legend.textContent) return;
    this.#legend.replaceWith(legend);
    this.#legend = legend;
  }

  /** Shows the decisions for the workers whose names contain this. */
  only(worker) {
    this.#filter.value = worker;
    this.#reason.value = "";
    if (this.#live !== null) this.render(this.#live);
  }

  render(live) {
    this.#live = live;
    const all = this.#paused ?? live.decisions;
    const wanted = this.#filter.value.trim().toLowerCase();
    const reason = this.#reason.value;
    const missed = this.#paused === null ? 0 : fresh(live.decisions, this.#paused);
    const key = [live.decisionsVersion, wanted, reason, this.#paused === null, live.routers.length > 1, document.body.dataset.view].join("|");
    if (key === this.#drawn) return;
    this.#drawn = key;
    const matching = all.filter((decision) =>
      (reason === "" || decision.reason === reason) && (wanted === "" || decision.worker_id.toLowerCase().includes(wanted)));
    const shown = matching.slice(0, document.body.dataset.view === "decisions" ? SHOWN : BESIDE);
    this.#rows.render(shown.map((decision) => ({ decision, several: live.routers.length > 1 })), ({ decision }) => decision.id);
    text(byId("decisions-aside"), [
      this.#paused === null ? "" : `Paused, ${count(missed, "newer decision")}`,
      wanted === "" && reason === "" ? "" : `${integer(matching.length)} of the latest ${integer(all.length)}`,
    ].filter(Boolean).join(" · "));
    scaleCosts(byId("stream"), shown);
    this.#renderLegend(shown);
    const none = byId("decisions-none");
    show(none, shown.length === 0);
    text(none, all.length === 0
      ? "No decisions yet. Each request with a prompt adds one, with its reason."
      : "None of the latest decisions matches.");
  }
}

/** How many of the latest decisions have come since. */
function fresh(decisions, paused) {
  if (paused.length === 0) return decisions.length;
  const at = decisions.findIndex((decision) => decision.id === paused[0].id);
  return at < 0 ? decisions.length : at;
}

function row({ decision, several }) {
  const { matched_blocks: matched, prompt_blocks: blocks } = decision;
  const match = blocks > 0 ? `${integer(matched)} of ${count(blocks, "block")}` : "not read";
  const bar = costBar(decision);
  const to = el("p", { class: "to" });
  nameLabel(to, decision.worker_id, "to ");
  const node = el("li", { class: "decision" },
    el("time", { datetime: new Date(decision.at * 1000).toISOString() }, clock(decision.at)),
    to,
    el("p", { class: "ttft" }, seconds(decision.predicted_ttft_seconds), el("span", { class: "hidden-text" }, " to the first token, predicted")),
    el("p", { class: "why" }, el("strong", {}, reasonName(decision.reason)),
      el("span", { class: "more" }, `: ${reasonWords(decision.reason)}`), several && ` · ${decision.router}`),
    el("p", { class: "match" }, match),
    bar);
  return { node, update: () => {} };
}
