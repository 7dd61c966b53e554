// How the whole is doing: one verdict, with what to do. A pure function of the live document.

import { count, list } from "./format.js";
import { stateWords, workerState } from "./words.js";

/** Whether a person should look at this worker. */
export const needsAttention = (worker) => ["bad", "warn"].includes(workerState(worker).tone);

/** Whether it is on its way in or out. */
export const isPassing = (worker) => ["info", "quiet"].includes(workerState(worker).tone);

/**
 * `{level, title, text, hints}`. Levels: `good`, `idle` (no request yet), `empty`, `starting`, `degraded`, `down`. Hints are alternating texts and
 * `{code}`, one line each.
 */
export function health({ routers, workers, totals }) {
  const broken = routers.filter((router) => router.state === "serving" && !router.ready);
  const lost = routers.filter((router) => router.state === "unreachable");
  const ready = workers.filter((worker) => worker.ready);
  if (workers.length === 0) return empty(routers);
  if (ready.length === 0) {
    return workers.every(isPassing) && workers.some((worker) => worker.state === "starting")
      ? starting(workers, routers)
      : down(workers);
  }
  const problems = [];
  const ill = workers.filter(needsAttention);
  if (ill.length > 0) problems.push(stateWords(ill));
  if (broken.length > 0) problems.push(...broken.map((router) => `router ${router.name}: ${router.reason ?? "not ready"}`));
  if (lost.length > 0) problems.push(`${count(lost.length, "router")} cannot be reached: ${list(lost.map((router) => router.name))}`);
  for (const router of routers) {
    if (router.tokenizer === "failed") problems.push(`router ${router.name} has no tokenizer and routes by load`);
    if (router.discovery?.error) problems.push(`router ${router.name} cannot confirm its list of workers: ${router.discovery.error}`);
  }
  if (problems.length === 0) return unused({ totals }) ? idle(ready) : { level: "good", title: "", text: "", hints: [] };
  return {
    level: "degraded",
    title: ready.length === workers.length ? "Serving, with problems" : `${ready.length} of ${count(workers.length, "worker")} ready`,
    text: sentence(problems),
    hints: ill.length > 0 ? ["In the view Fleet, the workers under “Needs attention” come with what is wrong and what to do."] : [],
  };
}

/** Nobody has sent a request yet. */
export const unused = ({ totals }) => totals.requests === 0;

function idle(ready) {
  return {
    level: "idle",
    title: `${count(ready.length, "worker")} ready for the first request`,
    text: "Send one to the router's data port: figures, charts and decisions appear with it.",
    hints: [{ code: FIRST_REQUEST }],
  };
}

const FIRST_REQUEST = `curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "Hello", "max_tokens": 8}'`;

function empty(routers) {
  const sources = new Set(routers.map((router) => router.discovery?.source).filter(Boolean));
  const errors = routers.map((router) => router.discovery?.error).filter(Boolean);
  const hints = [];
  if (errors.length > 0) hints.push(`Discovery says: ${errors[0]}`);
  if (sources.has("inference-pool")) hints.push("Are there pods with the pool's labels?", { code: "kubectl describe inferencepools" });
  if (sources.has("kubernetes")) hints.push("Are there pods behind the workers' Service?", { code: "kubectl get pods,endpointslices" });
  if (sources.has("file")) hints.push("Does the file that --workers-file names list any worker? One URL a line.");
  if (sources.has("static") || sources.size === 0) {
    hints.push("Start a worker that registers itself:", { code: "python -m worker.main --port 8101 --router-url http://127.0.0.1:9000" });
    hints.push("Or run a whole KVCluster on this machine:", { code: "kvcluster up examples/rag.yaml" });
  }
  return { level: "empty", title: "No workers yet", text: "The router runs and knows no worker. Tiles appear here as soon as one joins.", hints };
}

function starting(workers, routers) {
  const cluster = routers.some((router) => ["kubernetes", "inference-pool"].includes(router.discovery?.source));
  return {
    level: "starting",
    title: `${count(workers.length, "worker")} starting`,
    text: "Requests wait for the first of them. An emulated worker takes a second or two, a real engine minutes to load its model.",
    hints: cluster
      ? ["If this lasts, ask what keeps them:", { code: "kubectl kvcluster explain NAME" }]
      : ["If this lasts, look at their logs: kvcluster up writes them to the folder that it names."],
  };
}

function down(workers) {
  return {
    level: "down",
    title: "No worker takes requests",
    text: sentence([stateWords(workers)]),
    hints: ["Clients get 503 until one is back. In the view Fleet, each worker comes with what is wrong and what to do."],
  };
}

function sentence(problems) {
  const joined = problems.join("; ");
  return joined.charAt(0).toUpperCase() + joined.slice(1) + (/[.!?]$/.test(joined) ? "" : ".");
}
