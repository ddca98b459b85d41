// Filter of the verdicts, links that open the claim they lead to, all claims at once.
(() => {
  "use strict";
  const form = document.getElementById("filter");
  const rows = [...document.querySelectorAll(".verdicts tbody tr")];
  const claims = new Map([...document.querySelectorAll("details.claim")].map((c) => [c.dataset.claim, c]));
  const filter = () => {
    const data = new FormData(form);
    const verdicts = new Set(data.getAll("verdict"));
    const scale = data.get("scale");
    const words = data.get("words").toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = `${row.dataset.claim} ${row.textContent}`.toLowerCase();
      const fits = verdicts.has(row.dataset.verdict) && (!scale || row.dataset.scale === scale)
        && words.every((word) => text.includes(word));
      row.hidden = !fits;
      const claim = claims.get(row.dataset.claim);
      if (claim) claim.hidden = !fits;
      shown += fits;
    }
    form.querySelector(".showing").textContent = `${shown} of ${rows.length} claims shown`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();

  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    target.hidden = false;
    const details = target.closest("details");
    if (details) { details.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", open);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (link && link.hash === location.hash) open();
  });
  open();

  const all = document.getElementById("open-all");
  all.hidden = false;
  all.addEventListener("click", (event) => {
    const wanted = event.target.dataset.open;
    if (wanted) for (const claim of claims.values()) claim.open = wanted === "true";
  });

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...claims.values()].filter((claim) => !claim.open);
    for (const claim of closed) claim.open = true;
  });
  addEventListener("afterprint", () => { for (const claim of closed) claim.open = false; });
})();
