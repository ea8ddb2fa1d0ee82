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
  const savePicture = async (plot, format) => {
    document.documentElement.classList.add("paper");
    await draw(plot, picture.width);
    document.documentElement.classList.remove("paper");
    const asked = { format, width: picture.width, height: plot.clientHeight, filename: plot.id };
    await Plotly.downloadImage(plot, { ...asked, scale: format === "png" ? picture.scale : 1 });
    await draw(plot);
  };

  // One figure by itself: the policy, style and scripts of this page, so that it draws as here and loads nothing either.
  const pageOf = (plot) => {
    const found = document.implementation.createHTMLDocument();
    const copy = (element, place) => place.appendChild(found.importNode(element, true));
    found.documentElement.lang = document.documentElement.lang;
    found.body.className = "alone";
    document.querySelectorAll("head > meta").forEach((meta) => copy(meta, found.head)); // first of all the charset
    copy(document.querySelector("head > style[data-page]"), found.head);
    copy(document.querySelector("header"), found.body).querySelector("p").prepend("From: ");
    const figure = copy(plot.closest("figure"), found.body.appendChild(found.createElement("main")));
    document.querySelectorAll("body > script").forEach((script) => copy(script, found.body));
    const drawn = figure.querySelector(".plot");
    drawn.replaceChildren();
    drawn.className = "plot";
    figure.querySelector('[data-format="html"]').remove();
    found.title = `${figure.querySelector("figcaption b").textContent} · ${document.title}`;
    return `<!DOCTYPE html>\n${found.documentElement.outerHTML}`;
  };
  const savePage = (plot) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([pageOf(plot)], { type: "text/html" }));
    link.download = `${plot.id}.html`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000); // a browser may ask where to put it, and read it then
  };

  const save = ({ picture: name, format }) => {
    const plot = document.getElementById(name);
    return format === "html" ? savePage(plot) : savePicture(plot, format);
  };
  document.querySelectorAll("[data-picture]").forEach((button) => button.addEventListener("click", () => save(button.dataset)));

  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  // Before the pages are counted: a change of media comes too late, and what grew is cut off.
  addEventListener("beforeprint", toPaper);
  addEventListener("afterprint", toScreen);
})();
