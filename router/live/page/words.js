// What states and reasons mean, in words, and what to do about them.

import { age, integer } from "./format.js";

/**
 * States of workers. `tone` chooses the colour; the icon's shape and the name say the same without it.
 * `rank` orders tiles, the most urgent first.
 */
const WORKER_STATES = {
  unreachable: { name: "Unreachable", icon: "unreachable", tone: "bad", rank: 0,
    advice: "Does its process or pod run? Its log says more." },
  ejected: { name: "Ejected", icon: "ejected", tone: "bad", rank: 1,
    advice: "It is tried again by itself. Its log says why it fails." },
  agent: { name: "Agent", icon: "agent", tone: "bad", rank: 2,
    advice: "List the engine's URL instead, with this one as its feed." },
  half_open: { name: "On trial", icon: "half_open", tone: "warn", rank: 3,
    advice: "Nothing to do yet: it gets one request at a time until it answers well." },
  paused: { name: "Paused", icon: "paused", tone: "warn", rank: 4,
    advice: "It is left alone for a moment. If this lasts, add workers." },
  closed: { name: "Closed", icon: "closed", tone: "quiet", rank: 6,
    advice: "Nothing to do: it finishes the requests that it has." },
  draining: { name: "Draining", icon: "draining", tone: "quiet", rank: 7,
    advice: "Nothing to do: it finishes the requests that it has." },
  starting: { name: "Starting", icon: "starting", tone: "info", rank: 8,
    advice: "An engine takes minutes to load its model. Its log says how far it is." },
  serving: { name: "Serving", icon: "serving", tone: "good", rank: 9, advice: "" },
};

/** A serving worker whose cache is not matched. */
const UNMATCHED = { name: "Not matched", icon: "unmatched", tone: "warn", rank: 5,
  advice: "Until this is mended it gets requests by load alone." };

const UNKNOWN = { name: "Unknown", icon: "unmatched", tone: "warn", rank: 5, advice: "" };

/** What a worker is shown as. */
export function workerState(worker) {
  const state = WORKER_STATES[worker.state] ?? { ...UNKNOWN, name: worker.state };
  return state.tone === "good" && worker.problem !== null ? UNMATCHED : state;
}

/** The name of a state inside a sentence. */
export const stateName = (state) => (WORKER_STATES[state]?.name ?? state).toLowerCase();

/** How many workers are shown as what, the most urgent first: `[{name, number}]`. */
export function stateCounts(workers) {
  const counts = new Map();
  for (const worker of workers) {
    const { name, rank } = workerState(worker);
    const known = counts.get(name);
    if (known) known.number += 1;
    else counts.set(name, { name, rank, number: 1 });
  }
  return [...counts.values()].sort((a, b) => a.rank - b.rank);
}

/** "2 unreachable, 1 paused" */
export const stateWords = (workers) =>
  stateCounts(workers).map(({ name, number }) => `${integer(number)} ${name.toLowerCase()}`).join(", ");

const ROUTER_STATES = {
  serving: { name: "Serving", tone: "good", icon: "serving" },
  draining: { name: "Draining", tone: "quiet", icon: "draining" },
  closing: { name: "Closing", tone: "quiet", icon: "closed" },
  unreachable: { name: "Unreachable", tone: "bad", icon: "unreachable" },
};
const NOT_READY = { name: "Not ready", tone: "bad", icon: "unreachable" };

/** What a router is shown as. */
export function routerState(router) {
  const state = ROUTER_STATES[router.state] ?? { name: router.state, tone: "warn", icon: "unmatched" };
  return state.tone === "good" && !router.ready ? NOT_READY : state;
}

const TRUST = {
  exact: "exact: the router knows its cache",
  partial: "partial: the router knows what it sent there",
  none: "none: it gets requests by load",
};

/** How exactly the router knows the worker's cache, and since when. */
export const viewWords = ({ trust, view_age_seconds: confirmed }) =>
  `${TRUST[trust] ?? trust}${confirmed === null ? "" : `, ${confirmedWords(confirmed)}`}`;

/** "confirmed 3 s ago" */
export const confirmedWords = (confirmed) => `confirmed ${age(confirmed)} ago`;

/** Reasons of decisions: short, and as the end of a sentence that begins with the worker's name. */
export const REASONS = {
  prefix_match: ["Prefix match", "no other worker holds more of the prompt, and it costs the least there"],
  load_over_prefix: ["Load over prefix", "another worker holds more of the prompt, but waiting for it would cost more than its cache saves"],
  no_match: ["No match", "no worker holds any of the prompt, and it costs the least there"],
  no_prefix: ["No prefix", "there was nothing to match: the prompt has no full block, or no cache can be matched"],
  longest_prefix: ["Longest prefix", "it has the longest match (strategy longest_prefix looks at nothing else)"],
  round_robin: ["Round robin", "it is its turn (strategy round_robin)"],
  least_loaded: ["Least loaded", "it has the fewest requests (strategy least_loaded)"],
  lmetric: ["LMetric", "prefill to come times requests is smallest there (strategy lmetric)"],
  linear: ["Linear", "blocks to compute plus blocks in use are fewest there (strategy linear)"],
  only_candidate: ["Only candidate", "no other worker can take the request"],
  stored_response: ["Stored response", "only it stores the earlier response"],
};

export const reasonName = (reason) => (Object.hasOwn(REASONS, reason) ? REASONS[reason][0] : reason);
export const reasonWords = (reason) => (Object.hasOwn(REASONS, reason) ? REASONS[reason][1] : reason);

/** Why a prompt was not read. */
export const UNREAD = {
  unreadable: "The router cannot read this prompt, so it is routed by load. Is it a body that this API takes?",
  too_long: "The prompt is longer than any worker takes: an engine will refuse it.",
  busy: "The router was too busy to read the prompt in time, and routes it by load.",
  no_tokenizer: "The router has no tokenizer for this model yet, and routes by load until it has.",
};

/** The parts of a cost, in the order in which they are drawn. */
export const COSTS = [
  ["queue", "Queue", "until the worker would start on the request"],
  ["load", "Load", "loading blocks from slower tiers of its cache"],
  ["prefill", "Prefill", "computing the blocks that it does not hold"],
  ["decode", "Decode", "what it and its neighbours lose by decoding together"],
  ["charge", "Charge", "for computing what another worker has cached; below zero where a further copy pays off"],
];
