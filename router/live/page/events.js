// Server-sent events, read by fetch: an EventSource sends no headers, and so no token.

const STORED = "kvcluster-token";

/** Takes the token out of an address that ends in `#token=…`, and keeps it as long as this tab is open. */
export function takeToken() {
  const given = /^#token=(.+)$/.exec(location.hash);
  if (given === null) return;
  sessionStorage.setItem(STORED, decodeURIComponent(given[1]));
  history.replaceState(null, "", location.pathname + location.search);
}

/** The headers by which this page's requests are let in. */
export function credentials() {
  const token = sessionStorage.getItem(STORED);
  return token === null ? {} : { authorization: `Bearer ${token}` };
}

/**
 * Reads the events of `url` until it is closed. `onEvent(type, data)` gets each one; `onEnd(why)` is called once if they
 * end by themselves: `why` in the words of whoever refuses to send any, null if the connection broke.
 */
export class EventReader {
  #abort = new AbortController();
  #onEvent;

  constructor(url, onEvent, onEnd) {
    this.#onEvent = onEvent;
    this.#read(url).then((why) => {
      if (!this.#abort.signal.aborted) onEnd(why);
    });
  }

  close() {
    this.#abort.abort();
  }

  async #read(url) {
    try {
      const response = await fetch(url, { cache: "no-store", headers: credentials(), signal: this.#abort.signal });
      if (!response.ok) {
        const body = await response.json().catch(() => null);
        return body?.error?.message ?? `it answers ${response.status} ${response.statusText}`.trim();
      }
      if (!response.headers.get("content-type")?.startsWith("text/event-stream")) return null;
      await this.#parse(response.body.pipeThrough(new TextDecoderStream()).getReader());
    } catch {
      // The connection broke, or could not be made.
    }
    return null;
  }

  async #parse(reader) {
    let rest = "";
    let type = "message";
    let data = [];
    for (;;) {
      const { done, value } = await reader.read();
      if (done || this.#abort.signal.aborted) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("event:")) type = line.slice(6).trimStart();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "") {
          if (data.length > 0) this.#onEvent(type, data.join("\n"));
          if (this.#abort.signal.aborted) return;
          type = "message";
          data = [];
        }
      }
    }
  }
}
