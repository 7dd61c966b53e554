// The page's copy of the live document (router/live/document.py), kept up to date by the events of GET /live/events
// (router/live/updates.py).

const KEPT = 500; // decisions that the page remembers; the router's document holds fewer

/** The document did not arrive as one: something else answers at its URL, or another version of the router. */
export class DocumentError extends Error {}

export class LiveDocument {
  at = 0;
  routers = [];
  workers = new Map(); // by URL
  totals = null;
  history = null;
  decisions = []; // newest first
  queues = []; // the most urgent class first
  receivedAt = 0; // performance.now() of the latest event
  historyVersion = 0; // grows when `history` changes
  decisionsVersion = 0;

  /** Takes an event in. Throws `DocumentError`. */
  receive(type, data) {
    let content;
    try {
      content = JSON.parse(data);
    } catch {
      throw new DocumentError("it answers with something else than JSON");
    }
    if (type === "live") this.#replace(content);
    else this.#update(content);
    this.receivedAt = performance.now();
  }

  /** Seconds since the latest event. */
  get age() {
    return (performance.now() - this.receivedAt) / 1000;
  }

  /** Unix seconds now by the router's clock, which may differ from this machine's. */
  get now() {
    return this.at + this.age;
  }

  #replace({ at, routers, workers, totals, history, decisions, queues = [] }) {
    if (![routers, workers, decisions, history?.at].every(Array.isArray) || typeof at !== "number" || !totals) {
      throw new DocumentError("it answers with another document than this page knows: reload the page");
    }
    this.at = at;
    this.routers = routers;
    this.workers = new Map(workers.map((worker) => [worker.url, worker]));
    this.totals = totals;
    this.queues = queues;
    this.history = history;
    this.historyVersion += 1;
    this.#remember(decisions);
  }

  #update({ at, routers, workers, gone, totals, history, history_steps: steps, decisions, queues = null }) {
    this.at = at;
    this.routers = routers ?? this.routers;
    this.totals = totals ?? this.totals;
    this.queues = queues ?? this.queues;
    for (const url of gone) this.workers.delete(url);
    for (const changed of workers) this.workers.set(changed.url, { ...this.workers.get(changed.url), ...changed });
    if (history !== null) {
      this.history = joined(this.history, history, steps);
      this.historyVersion += 1;
    }
    if (decisions.length > 0) this.#remember(decisions);
  }

  /** A router that was restarted begins with none: the page keeps those that it has seen. */
  #remember(decisions) {
    const known = new Set(this.decisions.map((decision) => decision.id));
    const fresh = decisions.filter((decision) => !known.has(decision.id));
    if (fresh.length === 0) return;
    this.decisions = [...fresh, ...this.decisions].sort((a, b) => b.at - a.at).slice(0, KEPT);
    this.decisionsVersion += 1;
  }
}

/** The steps of `fresh` replace those from its first one on. */
function joined(old, fresh, steps) {
  const from = fresh.at.length > 0 ? old.at.findIndex((at) => at >= fresh.at[0]) : -1;
  const kept = from < 0 ? old.at.length : from;
  const history = { step_seconds: fresh.step_seconds };
  for (const [name, values] of Object.entries(fresh)) {
    if (!Array.isArray(values)) continue;
    const all = [...old[name].slice(0, kept), ...values];
    history[name] = all.slice(all.length - steps);
  }
  return history;
}
