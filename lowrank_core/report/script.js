"use strict";
// Draws the figures in the colours of the page, and again when these change: light, dark, paper.
(() => {
  const config = JSON.parse(document.getElementById("figure-config").textContent);
  const paper = 660; // pixels: what an A4 page holds
  const narrow = 480; // pixels: below, axis titles need small letters
  const plots = () => document.querySelectorAll(".plot");

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    return Object.fromEntries(["ink", "soft", "line", "page", "font"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  };

  const themed = (layout, width) => {
    const { ink, soft, line, page, font } = colours();
    const found = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, color: ink, family: font, size: width < narrow ? 10 : 12 },
      hoverlabel: { ...layout.hoverlabel, bgcolor: page, bordercolor: soft, font: { color: ink, family: font } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
    };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)))
      found[name] = { ...layout[name], gridcolor: line, linecolor: soft, tickcolor: soft };
    return found;
  };

  const draw = (plot, width) => {
    const { data, layout } = JSON.parse(document.querySelector(`[data-figure="${plot.id}"]`).textContent);
    return Plotly.react(plot, data, { ...layout, ...themed(layout, width || plot.clientWidth), autosize: !width, width }, config);
  };

  const drawAll = (width) => plots().forEach((plot) => draw(plot, width));

  let opened = [];
  const toPaper = () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((part) => (part.open = true));
    document.documentElement.classList.add("paper");
    drawAll(paper);
  };
  const toScreen = () => {
    opened.forEach((part) => (part.open = false));
    document.documentElement.classList.remove("paper");
    drawAll();
  };

  // A picture is for paper: dark ink, drawn by this browser, with nothing asked of a server.
  const picture = { width: 900, scale: 2 };
  const save = async (button) => {
    const plot = document.getElementById(button.dataset.picture);
    document.documentElement.classList.add("paper");
    await draw(plot, picture.width);
    document.documentElement.classList.remove("paper");
    const asked = { format: button.dataset.format, width: picture.width, height: plot.clientHeight, filename: plot.id };
    await Plotly.downloadImage(plot, { ...asked, scale: asked.format === "png" ? picture.scale : 1 });
    await draw(plot);
  };
  document.querySelectorAll("[data-picture]").forEach((button) => button.addEventListener("click", () => save(button)));

  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  // Before the pages are counted: a change of media comes too late, and what grew is cut off.
  addEventListener("beforeprint", toPaper);
  addEventListener("afterprint", toScreen);
})();
