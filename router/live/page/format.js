// Figures as people read them. Every function takes null for "there is no value" and then gives a dash.

export const NONE = "–";
const SPACE = "\u00a0"; // between a number and its unit, which a line break must not part

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const time = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const fixed = [0, 1, 2].map(
  (places) => new Intl.NumberFormat("en", { minimumFractionDigits: places, maximumFractionDigits: places }),
);

/** 12,031 */
export const integer = (value) => (value === null ? NONE : whole.format(value));

/** 174M */
export const compact = (value) => (value === null ? NONE : value < 10_000 ? whole.format(value) : short.format(value));

/** 1.04, 10.4, 104. Only nothing is 0: what is less than can be shown is <0.01. */
export function decimal(value) {
  if (value === null) return NONE;
  const size = Math.abs(value);
  if (value > 0 && value < 0.01) return "<0.01";
  return fixed[size >= 100 || size === 0 ? 0 : size >= 10 ? 1 : 2].format(value);
}

/** 81.8 % of a share between 0 and 1. Only all is 100 %, and only nothing is 0 %. */
export function percent(share, places = 1) {
  if (share === null) return NONE;
  const least = 10 ** -places;
  let value = share * 100;
  if (share > 0 && share < 1) value = Math.min(100 - least, Math.max(least, value));
  return fixed[places].format(value) + SPACE + "%";
}

/** 0.4 ms, 41 ms, 1.24 s, 12 min 4 s, 3 h 20 min */
export function seconds(value) {
  if (value === null) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "0" + SPACE + "ms";
  if (size < 0.00005) return (value < 0 ? "−" : "") + "<0.1" + SPACE + "ms";
  const sign = value < 0 ? "−" : "";
  if (size < 0.9995) return sign + fixed[size < 0.00995 ? 1 : 0].format(size * 1000) + SPACE + "ms";
  if (size < 59.95) return sign + fixed[size < 9.995 ? 2 : 1].format(size) + SPACE + "s";
  return sign + parts(size);
}

/** How long ago: <1 s, 3 s, 2 min 5 s, 1 h 4 min */
export function age(value) {
  if (value === null) return NONE;
  if (value < 1) return "<1" + SPACE + "s";
  return value < 60 ? Math.floor(value) + SPACE + "s" : parts(value);
}

function parts(value) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const total = Math.round(value);
  const first = units.findIndex(([, size]) => total >= size);
  const [[unit, size], rest] = [units[first], units[first + 1]];
  const left = rest === undefined ? 0 : Math.floor((total % size) / rest[1]);
  return Math.floor(total / size) + SPACE + unit + (left > 0 ? " " + left + SPACE + rest[0] : "");
}

/** 14:03:21 of Unix seconds, by the clock of whoever looks. */
export const clock = (unix) => time.format(new Date(unix * 1000));

/** "1 worker", "2 workers" */
export const count = (number, noun) => `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;

/** "a", "a and b", "a, b, c and 3 more" of so many in `total` */
export function list(names, most = 4, total = names.length) {
  const shown = names.slice(0, total > most ? most - 1 : most);
  const left = total - shown.length;
  if (left > 0) return `${shown.join(", ")} and ${whole.format(left)} more`;
  return shown.length > 1 ? `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}` : (shown[0] ?? "");
}
