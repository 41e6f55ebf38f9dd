"use strict";
(() => {
  // Theme: follows the system until the reader chooses; a page opened from a file may not be allowed to remember it.
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => { try { return localStorage.getItem("dstune-theme"); } catch { return null; } };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  if (remembered()) root.dataset.theme = remembered();
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("dstune-theme", root.dataset.theme); } catch { /* not remembered */ }
    label();
  });
  system.addEventListener("change", label);
  label();

  // Values under the pointer, at the same step in every chart; the arrow keys move along a focused chart.
  const element = (parent, name, className, text) => {
    const made = document.createElement(name);
    made.className = className;
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const nearest = (steps, wanted) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low > 0 && wanted - steps[low - 1] <= steps[low] - wanted ? low - 1 : low;
  };
  const charts = [...document.querySelectorAll(".plot[data-hover]")].map((plot) => {
    const { span, lines } = JSON.parse(plot.dataset.hover);
    const overlay = element(plot, "div", "overlay");
    const across = (step) => (100 * (step - span[0])) / (span[1] - span[0]);
    const clear = () => overlay.replaceChildren();
    const show = (wanted, withTip) => {
      clear();
      const near = lines.map((line) => ({ line, at: nearest(line.steps, wanted) }));
      const steps = near.map(({ line, at }) => line.steps[at]);
      const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
      element(overlay, "div", "hair").style.left = `${across(step)}%`;
      const shown = near.filter(({ line, at }) => line.steps[at] === step);
      for (const { line, at } of shown) {
        if (line.top[at] === null || line.faint) continue;
        const point = element(overlay, "span", `point c${line.colour}`);
        point.style.left = `${across(step)}%`;
        point.style.top = `${line.top[at]}%`;
      }
      if (!withTip) return step;
      const tip = element(overlay, "div", "tip");
      element(tip, "b", "", `step ${step.toLocaleString("en")}`);
      for (const { line, at } of shown) {
        const row = element(tip, "div", "");
        element(row, "span", `swatch c${line.colour}`);
        element(row, "span", "name", line.label);
        element(row, "span", "", line.text[at]);
      }
      if (across(step) < 50) tip.style.left = `calc(${across(step)}% + 10px)`;
      else tip.style.right = `calc(${100 - across(step)}% + 10px)`;
      return step;
    };
    return { plot, span, lines, show, clear, at: null };
  });
  const everywhere = (step, own) => charts.forEach((chart) => {
    const shown = chart.show(step, chart === own);
    if (chart === own) chart.at = shown;
  });
  const nowhere = () => charts.forEach((chart) => chart.clear());
  for (const chart of charts) {
    const { plot, span } = chart;
    const follow = (event) => {
      const box = plot.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      everywhere(span[0] + share * (span[1] - span[0]), chart);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", nowhere);
    plot.addEventListener("blur", nowhere);
    plot.addEventListener("keydown", (event) => {
      const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!direction) return;
      event.preventDefault();
      const steps = [...new Set(chart.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
      const from = chart.at === null ? -1 : steps.indexOf(chart.at);
      everywhere(steps[Math.min(steps.length - 1, Math.max(0, from + direction))], chart);
    });
  }
})();
