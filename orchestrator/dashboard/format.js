// How numbers and times are written. Times are the server's: `skew` is by how much its clock is ahead of ours.

let skewMs = 0;

export function noteServerTime(header) {
  const server = Date.parse(header ?? "");
  if (!Number.isNaN(server)) skewMs = server - Date.now();
}

export const serverNow = () => Date.now() + skewMs;

const integers = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const integer = (value) => (value === null || value === undefined ? "–" : integers.format(value));

export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 10) return `${Math.round(ms * 10) / 10} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const s = ms / 1000;
  if (s < 60) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.round((s % 86400) / 3600)} h`;
}

export function ago(iso) {
  if (!iso) return "–";
  const s = (serverNow() - Date.parse(iso)) / 1000;
  const [text, ahead] = [Math.abs(s), s < -1];
  let said;
  if (text < 2) return "now";
  if (text < 60) said = `${Math.round(text)} s`;
  else if (text < 3600) said = `${Math.round(text / 60)} min`;
  else if (text < 86400) said = `${Math.round(text / 3600)} h`;
  else said = `${Math.round(text / 86400)} d`;
  return ahead ? `in ${said}` : `${said} ago`;
}

export const when = (iso) => (iso ? new Date(iso).toLocaleString("en", {
  year: "numeric", month: "short", day: "2-digit", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
}) : "–");

export const clock = (iso) => new Date(iso).toLocaleTimeString("en", { hourCycle: "h23" });
