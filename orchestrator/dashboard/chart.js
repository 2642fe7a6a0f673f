// Time series. uPlot draws; colours come from the style sheet, so that a chart follows dark and light.

import uPlot from "./vendor/uplot/uPlot.esm.js";
import { h } from "./dom.js";

const charts = new Set();
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export function recolour() {
  for (const chart of charts) chart.rebuild();
}

const pad = (number) => String(number).padStart(2, "0");
const day = new Intl.DateTimeFormat("en", { month: "short", day: "numeric" });
/** The hour; at midnight the day. */
function moment(seconds) {
  const date = new Date(seconds * 1000);
  const [hours, minutes] = [date.getHours(), date.getMinutes()];
  return hours || minutes ? `${pad(hours)}:${pad(minutes)}` : day.format(date);
}

const sums = (columns) => columns.reduce((all, column) => {
  const below = all.at(-1);
  all.push(column.map((value, index) => (value ?? 0) + (below ? below[index] : 0)));
  return all;
}, []);

/**
 * A chart with a title. `series`: [{label, colour, kind: "line" | "bars"}]; `stacked` lays areas on each other;
 * `format` writes a value. `set(times, columns)` shows data; `destroy()` when the view goes.
 */
export function chart({ title, series, stacked = false, format, height = 180 }) {
  const box = h("div.plot");
  const empty = h("p.empty", { hidden: true }, "Nothing in this time.");
  const summary = h("p.hidden");
  const element = h("section.card.chart", { "aria-label": title }, h("h3", {}, title), box, empty, summary);
  let plot = null;
  let times = [];
  let columns = series.map(() => []);

  function options(width) {
    const axis = {
      stroke: colour("muted"), font: "11px system-ui, sans-serif",
      grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1, size: 4 },
    };
    // The topmost of a stack is drawn first, and the others over it.
    const shown = stacked ? [...series].reverse() : series;
    return {
      width, height, padding: [8, 8, 0, 0],
      cursor: { y: false, points: { size: 6 } },
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, Math.max(high ?? 0, 1) * 1.05] } },
      axes: [{ ...axis, size: 30, space: 64, values: (_, ticks) => ticks.map(moment) }, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => format(tick)) }],
      series: [
        { value: (_, seconds) => (seconds === null ? "" : new Date(seconds * 1000).toLocaleString("en", {
          month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23" })) },
        ...shown.map((one) => ({
          label: one.label, stroke: colour(one.colour), width: stacked ? 1 : 1.75, spanGaps: true,
          // An area is large: its colour is calmer than a line's.
          fill: stacked ? `color-mix(in srgb, ${colour(one.colour)} 70%, ${colour("card")})`
            : one.kind === "bars" ? colour(one.colour) : undefined,
          paths: one.kind === "bars" ? uPlot.paths.bars({ size: [0.7, 14], align: -1 }) : undefined,
          points: { show: one.kind === "bars" ? false : undefined, size: 5 },
          value: (_, __, ___, index) => {
            const value = index === null ? columns[series.indexOf(one)].at(-1) : columns[series.indexOf(one)][index];
            return value === null || value === undefined ? "–" : format(value);
          },
        })),
      ],
    };
  }

  const data = () => [times, ...(stacked ? sums(columns).reverse() : columns)];

  function build() {
    plot?.destroy();
    plot = null;
    if (box.clientWidth > 0 && times.length) plot = new uPlot(options(box.clientWidth), data(), box);
  }

  const resized = new ResizeObserver(() => {
    if (plot && Math.abs(plot.width - box.clientWidth) > 1) plot.setSize({ width: box.clientWidth, height });
    else if (!plot) build();
  });
  resized.observe(box);

  const made = {
    element,
    rebuild: build,
    set(newTimes, newColumns) {
      [times, columns] = [newTimes, newColumns];
      const something = columns.some((column) => column.some((value) => value));
      empty.hidden = something;
      box.hidden = !something;
      summary.textContent = series.map((one, index) => {
        const known = columns[index].filter((value) => value !== null);
        return `${one.label}: ${known.length ? format(known.at(-1)) : "no value"}`;
      }).join(", ");
      if (!something) return;
      if (plot) plot.setData(data());
      else build();
    },
    destroy() {
      resized.disconnect();
      plot?.destroy();
      charts.delete(made);
    },
  };
  charts.add(made);
  return made;
}
