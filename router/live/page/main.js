// The page: its connection, its copy of the live document, and its views.

import { Connection, Feed } from "./connection.js";
import { DecisionsView } from "./decisions.js";
import { LiveDocument } from "./document.js";
import { attribute, byId, el, show, text } from "./dom.js";
import { takeToken } from "./events.js";
import { ExplainView } from "./explain.js";
import { FleetView } from "./fleet.js";
import { age } from "./format.js";
import { health, needsAttention, unused } from "./health.js";
import { themeSwitch } from "./theme.js";
import { WorkersView } from "./workers.js";

const VIEWS = { fleet: "Fleet", decisions: "Decisions", explain: "Why would this prompt go there?" };
const ICONS = { idle: "arrow", empty: "info", starting: "starting", degraded: "unmatched", down: "unreachable" };
const ANNOUNCE = 10_000; // ms between two announcements of changes at least

takeToken();
const live = new LiveDocument();
let connection = { state: Connection.CONNECTING };

// --- views ---

function chooseView() {
  const wanted = location.hash.slice(1);
  if (wanted !== "" && !Object.hasOwn(VIEWS, wanted)) return; // a link inside the page
  const view = wanted || "fleet";
  attribute(document.body, "data-view", view);
  for (const link of document.querySelectorAll("[data-nav]")) {
    attribute(link, "aria-current", link.dataset.nav === view ? "page" : null);
  }
  text(byId("page-title"), VIEWS[view]);
  draw();
}

function decisionsOf(worker) {
  decisions.only(worker);
  location.hash = "#decisions";
}

// --- what a screen reader is told, seldom ---

let announcedAt = -Infinity;
let attention = null;

function announce(words) {
  announcedAt = performance.now();
  text(byId("announcer"), words);
}

/** Says which workers have come to need attention, and when none does any more. */
function announceChanges(verdict) {
  if (performance.now() - announcedAt < ANNOUNCE) return;
  const now = new Set([...live.workers.values()].filter(needsAttention).map((worker) => worker.worker_id));
  const before = attention;
  attention = now;
  if (before === null || (before.size === now.size && [...now].every((name) => before.has(name)))) return;
  announce(now.size === 0 ? "No worker needs attention any more." : `${verdict.title}. ${verdict.text}`);
}

// --- drawing: once for all that came since the last frame, and not while nobody looks ---

const fleet = new FleetView();
const decisions = new DecisionsView();
const workers = new WorkersView(decisionsOf);
new ExplainView(announce);
let scheduled = false;
let shownHealth = "";

function draw() {
  if (scheduled || live.totals === null) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    show(byId("waiting"), false);
    show(byId("content"), true);
    const view = document.body.dataset.view;
    if (view === "fleet") {
      fleet.render(live);
      workers.render(live);
    }
    if (view !== "explain") decisions.render(live);
    drawHealth();
    drawConnection();
  });
}

function drawHealth() {
  const verdict = health({ routers: live.routers, workers: [...live.workers.values()], totals: live.totals });
  announceChanges(verdict);
  attribute(document.body, "data-unused", unused(live));
  const key = JSON.stringify(verdict);
  if (key === shownHealth) return;
  shownHealth = key;
  const names = { good: "", idle: "", empty: "No workers · ", starting: "Starting · ", degraded: "Problems · ", down: "Down · " };
  document.title = `${names[verdict.level]}KVCluster`;
  const notice = byId("health");
  show(notice, verdict.level !== "good");
  attribute(notice, "data-level", verdict.level);
  if (verdict.level === "good") return;
  attribute(byId("health-icon"), "href", `#i-${ICONS[verdict.level]}`);
  text(byId("health-title"), verdict.title);
  text(byId("health-text"), verdict.text);
  byId("health-hints").replaceChildren(...verdict.hints.map((hint) =>
    typeof hint === "string" ? el("p", {}, hint) : el("code", {}, hint.code)));
}

// --- the connection, and how old the data are without it ---

const LOST = [Connection.WAITING, Connection.RETRYING, Connection.REFUSED];

function drawConnection() {
  const { state, retryAt, why, problem } = connection;
  const known = live.totals !== null;
  const words = {
    [Connection.CONNECTING]: "Connecting",
    [Connection.LIVE]: "Live",
    [Connection.SILENT]: `Silent for ${age(live.age)}`,
    [Connection.ASLEEP]: "Paused while hidden",
  };
  attribute(byId("connection"), "data-state", state);
  text(byId("connection-text"), words[state] ?? "Disconnected");
  attribute(document.body, "data-stale", known && state !== Connection.LIVE);
  const lost = LOST.includes(state);
  show(byId("lost"), lost);
  if (!lost) return;
  show(byId("waiting"), false);
  text(byId("lost-title"), problem === Connection.REFUSED ? "No live document here" : "The connection to the router is lost");
  const left = retryAt === undefined ? 0 : Math.max(0, Math.ceil((retryAt - performance.now()) / 1000));
  const next = state === Connection.RETRYING || left === 0 ? "Trying now." : `Next attempt in ${age(left)}.`;
  const about = problem === Connection.REFUSED
    ? `What answers at this address is no router that this page knows: ${why}.`
    : "The page reconnects by itself. Does the router still run, and does the port-forward?";
  text(byId("lost-text"), `${about} ${known ? `What you see is ${age(live.age)} old. ` : ""}${next}`);
}

function connectionChanged(state, details) {
  const before = connection.state;
  // While it tries again, what was the matter is still what is known.
  const problem = state === Connection.RETRYING ? connection.problem : state;
  connection = { ...connection, ...details, state, problem };
  if (LOST.includes(state) && !LOST.includes(before)) announce("The connection to the router is lost.");
  if (state === Connection.LIVE && LOST.includes(before)) announce("Connected again.");
  drawConnection();
}

const feed = new Feed("live/events", ["live", "update"], (type, data) => {
  live.receive(type, data);
  if (!document.hidden) draw();
}, connectionChanged);

byId("retry").addEventListener("click", () => feed.retry());
window.addEventListener("hashchange", chooseView);
document.addEventListener("visibilitychange", () => !document.hidden && draw());
setInterval(() => connection.state !== Connection.LIVE && !document.hidden && drawConnection(), 1_000);
themeSwitch(byId("theme"));
chooseView();
feed.start();
