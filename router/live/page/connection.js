// The page's connection to its router: server-sent events, reconnected by itself after a restart of the router.

import { EventReader } from "./events.js";

/** States of the connection. `transition` is the only way from one to another. */
export const Connection = Object.freeze({
  CONNECTING: "connecting", // the first attempt since somebody sees the page
  LIVE: "live", // events arrive
  SILENT: "silent", // it is open, but nothing has come for too long
  WAITING: "waiting", // it broke or could not be made: the next attempt is due
  RETRYING: "retrying", // an attempt after a failed one
  REFUSED: "refused", // what answers is no router with a live document; attempts go on
  ASLEEP: "asleep", // nobody can see the page: it is closed, and costs the router nothing
});

const { CONNECTING, LIVE, SILENT, WAITING, RETRYING, REFUSED, ASLEEP } = Connection;
const OPENED = { event: LIVE, failed: WAITING, refused: REFUSED, hidden: ASLEEP };
const CLOSED = { attempt: RETRYING, hidden: ASLEEP };
const TRANSITIONS = {
  [CONNECTING]: OPENED,
  [RETRYING]: OPENED,
  [LIVE]: { event: LIVE, silence: SILENT, failed: WAITING, refused: REFUSED, hidden: ASLEEP },
  [SILENT]: { event: LIVE, silence: WAITING, failed: WAITING, refused: REFUSED, hidden: ASLEEP },
  [WAITING]: CLOSED,
  [REFUSED]: CLOSED,
  [ASLEEP]: { seen: CONNECTING },
};

/** The state after an event; one that means nothing in a state changes nothing. */
export const transition = (state, event) => TRANSITIONS[state][event] ?? state;

const SILENCE = 7_000; // ms without an event until the data counts as stale, and again until the connection counts as lost
const FIRST_RETRY = 500;
const LONGEST_RETRY = 10_000;

/**
 * Follows `url` from `start` on, as long as the page can be seen. A browser allows six connections to one origin, for all
 * tabs together, and a stream takes one as long as it lasts: were those of hidden tabs kept open, the seventh tab would
 * get nothing, not even its files.
 *
 * `onMessage(type, data)` gets every event; it may throw, and then what answers is no
 * live document. `onState(state, {retryAt, why})` gets every change of state; `retryAt` is a `performance.now()`.
 */
export class Feed {
  #url;
  #types;
  #onMessage;
  #onState;
  #source = null;
  #state = CONNECTING;
  #failures = 0;
  #timers = {};

  constructor(url, types, onMessage, onState) {
    this.#url = url;
    this.#types = types;
    this.#onMessage = onMessage;
    this.#onState = onState;
  }

  start() {
    document.addEventListener("visibilitychange", () => this.#visibilityChanged());
    window.addEventListener("online", () => this.retry());
    if (document.hidden) this.#state = transition(this.#state, "hidden");
    else this.#open();
    this.#onState(this.#state, {});
  }

  /** Tries at once instead of when it is due. */
  retry() {
    if (this.#state !== WAITING && this.#state !== REFUSED) return;
    this.#timer("retry", null);
    this.#advance("attempt");
    this.#open();
  }

  #visibilityChanged() {
    if (document.hidden) {
      this.#close();
      this.#advance("hidden");
    } else if (this.#state === ASLEEP) {
      this.#failures = 0;
      this.#advance("seen");
      this.#open();
    }
  }

  #open() {
    const source = (this.#source = new EventReader(
      this.#url,
      (type, data) => {
        if (source === this.#source && this.#types.includes(type)) this.#received(type, data);
      },
      (why) => {
        if (source === this.#source) this.#retryLater(why === null ? "failed" : "refused", why ?? "the connection broke");
      },
    ));
    this.#listen();
  }

  #close() {
    this.#source?.close();
    this.#source = null;
    this.#timer("silence", null);
    this.#timer("retry", null);
  }

  #received(type, data) {
    try {
      this.#onMessage(type, data);
    } catch (error) {
      this.#retryLater("refused", error instanceof Error ? error.message : String(error));
      return;
    }
    this.#failures = 0;
    this.#listen();
    this.#advance("event");
  }

  #listen() {
    this.#timer("silence", SILENCE, () => {
      if (this.#state === LIVE) {
        this.#advance("silence");
        this.#listen();
      } else this.#retryLater("failed", "the router does not answer");
    });
  }

  #retryLater(event, why) {
    this.#close();
    const wait = Math.min(LONGEST_RETRY, FIRST_RETRY * 2 ** this.#failures) * (0.75 + Math.random() / 2);
    this.#failures += 1;
    this.#timers.retryAt = performance.now() + wait;
    this.#timer("retry", wait, () => this.retry());
    this.#advance(event, { retryAt: this.#timers.retryAt, why });
  }

  #advance(event, details = {}) {
    const before = this.#state;
    this.#state = transition(before, event);
    if (this.#state !== before || details.retryAt !== undefined) this.#onState(this.#state, details);
  }

  #timer(name, delay, then) {
    clearTimeout(this.#timers[name]);
    if (delay !== null) this.#timers[name] = setTimeout(then, delay);
  }
}
