"use strict";
// Renews the page by asking for it again: what is shown is always what the node itself wrote.
const PERIOD = 2000;
async function renew() {
  if (document.hidden) return;
  const away = document.getElementById("away");
  try {
    const answer = await fetch("/", { cache: "no-store", headers: { accept: "text/html" } });
    if (!answer.ok) throw new Error("status " + answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const main = document.querySelector("main");
    const old = new Map([...main.children].map((section) => [section.id, section]));
    const renewed = [...page.querySelector("main").children].map((section) => {
      const shown = old.get(section.id);
      // What was unfolded stays so.
      for (const fold of section.querySelectorAll("details")) fold.open = !!document.getElementById(fold.id)?.open;
      // Whoever is typing or walking through links is not disturbed.
      const isKept = shown && (shown.contains(document.activeElement) || shown.isEqualNode(section));
      return isKept ? shown : document.adoptNode(section);
    });
    if (renewed.length !== main.children.length || renewed.some((section, n) => section !== main.children[n])) {
      const focused = document.activeElement;
      main.replaceChildren(...renewed);
      if (focused && focused.isConnected) focused.focus({ preventScroll: true });
    }
    away.hidden = true;
  } catch (_) {
    away.hidden = false;
  }
}
setInterval(renew, PERIOD);
