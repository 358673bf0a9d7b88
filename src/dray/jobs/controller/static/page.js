// Shows what GET /view answers, until the job has ended. Text reaches the page as textContent only.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const FINAL = ["done", "interrupted", "failed"];
const PATIENCE = 5; // answers that may be missing in a row
const PAUSE = 500; // milliseconds before the next request where one had no answer; others are held by the controller
const LIMIT = 10000; // milliseconds that an answer may take

// Each plot: its title, its figures with their names, and how a value is written.
const PLOTS = [
  { title: "mean return", figures: { mean_return: "" }, write: number },
  { title: "throughput, MB/s", figures: { megabytes_per_second: "" }, write: number, zero: true },
  { title: "payloads trained on, 1/s", figures: { payloads_per_second: "" }, write: number, zero: true },
  { title: "staleness, versions", figures: { staleness: "" }, write: number, zero: true },
  { title: "ring fill", figures: { ring_fill: "" }, write: percent, share: true },
  { title: "waits", figures: { policy_waits: "policy", rollouts_wait: "rollouts" }, write: percent, share: true },
];

const byId = (id) => document.getElementById(id);

function number(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(3)));
}

function percent(value) {
  return typeof value === "number" ? `${Math.round(100 * value)} %` : "–";
}

function duration(seconds) {
  if (typeof seconds !== "number") return "–";
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- plots ---------------------------------------------------------------------------

const WIDTH = 360, HEIGHT = 150, LEFT = 8, RIGHT = 8, TOP = 18, BOTTOM = 20;

function bounds(plot, series) {
  if (plot.share) return [0, 1];
  const known = series.flat().filter((value) => value !== null);
  if (!known.length) return [0, 1];
  let low = Math.min(...known), high = Math.max(...known);
  if (plot.zero) low = Math.min(0, low);
  if (high === low) high = low + (Math.abs(low) || 1);
  return [low, high];
}

function picture(plot, seconds, series) {
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": plot.title });
  const [low, high] = bounds(plot, series);
  const begin = seconds.length ? seconds[0] : 0;
  const length = Math.max(1, (seconds.length ? seconds[seconds.length - 1] : 1) - begin);
  const x = (time) => LEFT + (WIDTH - LEFT - RIGHT) * (time - begin) / length;
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low);
  for (const value of [low, high]) {
    svg.append(drawn("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
  }
  svg.append(drawn("text", { x: LEFT, y: TOP - 5 }, plot.write(high)));
  svg.append(drawn("text", { x: LEFT, y: HEIGHT - BOTTOM - 4 }, plot.write(low)));
  svg.append(drawn("text", { x: LEFT, y: HEIGHT - 6 }, duration(begin)));
  svg.append(drawn("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, duration(begin + length)));
  series.forEach((values, index) => {
    let path = "", gap = true, last = null;
    values.forEach((value, at) => {
      if (value !== null) {
        path += `${gap ? "M" : "L"}${x(seconds[at]).toFixed(1)} ${y(value).toFixed(1)}`;
        last = [x(seconds[at]), y(value)];
      }
      gap = value === null;
    });
    svg.append(drawn("path", { class: `series-${index}`, d: path }));
    if (last) svg.append(drawn("circle", { class: `series-${index}`, cx: last[0], cy: last[1], r: 2.5 }));
  });
  return svg;
}

function figure(plot, view) {
  const made = element("figure"), caption = element("figcaption");
  caption.append(element("b", plot.title));
  Object.entries(plot.figures).forEach(([name, words], index) => {
    const value = plot.write(view.figures[name]);
    caption.append(element("span", words ? `${words} ${value}` : value, `series-${index}`));
  });
  const series = Object.keys(plot.figures).map((name) => view.history[name]);
  made.append(caption, picture(plot, view.history.seconds, series));
  return made;
}

// --- tables and lists ----------------------------------------------------------------

function row(member) {
  const made = element("tr");
  made.dataset.state = member.state;
  const silent = member.state === "active" && member.silence > Math.max(5, member.seconds / 2);
  const ring = element("td", undefined, "nowrap");
  if (member.ring_slots) {
    const meter = element("meter");
    meter.max = member.ring_slots;
    meter.value = member.ring_used_slots;
    ring.append(meter, ` ${member.ring_used_slots}/${member.ring_slots}`);
  }
  made.append(
    element("td", member.name, "nowrap"),
    element("td", member.state, "state nowrap"),
    element("td", silent ? `${member.doing} (silent for ${duration(member.silence)})` : member.doing),
    element("td", duration(member.seconds), "number"),
    element("td", member.waits_for),
    element("td", number(member.payloads), "number"),
    ring,
    element("td", "payload" in member.ages ? duration(member.ages.payload) : "", "number"),
    element("td", "lease" in member.ages ? duration(member.ages.lease) : "", "number"),
  );
  return made;
}

function list(id, made) {
  byId(`${id}-section`).hidden = made.length === 0;
  byId(id).replaceChildren(...made);
}

function metric([name, value]) {
  const made = element("div");
  made.append(element("dt", name), element("dd", number(value)));
  return made;
}

function logLine([name, text]) {
  const made = element("li");
  made.append(element("b", name), ` ${text}`);
  return made;
}

function notice(text) {
  byId("notice").hidden = false;
  byId("notice").textContent = text;
}

function ended(outcome, words = "has ended") {
  notice(`The job ${words} (${outcome.kind}): ${outcome.reason}`);
}

function show(view) {
  document.title = `${view.phase}, step ${view.step}: ${view.job}`;
  byId("job").textContent = view.job;
  byId("phase").textContent = view.phase;
  byId("phase").dataset.phase = view.phase;
  byId("time").textContent = duration(view.seconds);
  byId("step").textContent = `step ${view.step} of ${view.max_steps}`;
  byId("transfer").textContent = [view.transfer, view.lane].filter(Boolean).join(", ");
  byId("stall").hidden = view.stall === null;
  byId("stall").textContent = view.stall === null ? "" : `stall: ${view.stall.line}`;
  byId("recording").hidden = view.recording === "";
  byId("recording").textContent = `recording ${view.recording}`;
  byId("plots").replaceChildren(...PLOTS.map((plot) => figure(plot, view)));
  byId("members").replaceChildren(...view.members.map(row));
  byId("hidden-members").hidden = view.hidden_members === 0;
  byId("hidden-members").textContent = `${view.hidden_members} more replicas`;
  list("metrics", Object.entries(view.metrics).map(metric));
  list("stalls", view.stalls.map((line) => element("li", line)));
  list("warnings", view.warnings.map((line) => element("li", line)));
  list("log", view.log_lines.map(logLine));
  if (view.outcome !== null) ended(view.outcome, FINAL.includes(view.phase) ? "has ended" : "is ending");
}

// --- requests ------------------------------------------------------------------------

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function ask(seen) {
  const answer = await fetch(`view?seen=${seen}`, { cache: "no-store", signal: AbortSignal.timeout(LIMIT) });
  if (answer.status === 401) return null;
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  return answer.json();
}

async function follow() {
  let seen = -1, missing = 0, last = null;
  while (missing < PATIENCE) {
    try {
      last = await ask(seen);
      if (last === null) return notice("The page is closed to this browser. For a new URL: dray status --page");
      missing = 0;
      seen = last.number;
      show(last);
      if (FINAL.includes(last.phase)) return undefined;
    } catch {
      missing += 1;
      await pause(PAUSE);
    }
  }
  byId("phase").textContent = last !== null && last.outcome !== null ? "ended" : "not reached";
  if (last !== null && last.outcome !== null) return ended(last.outcome);
  return notice("The controller no longer answers: it has ended, or cannot be reached. Below is its last answer.");
}

follow();
