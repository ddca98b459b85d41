// One transport for all videos: they play in step, frame by frame of the first one's clock.
(() => {
  "use strict";
  const videos = [...document.querySelectorAll("video.film")];
  const transport = document.getElementById("transport");
  if (!videos.length || !transport) return;
  const [play, time, clock] = ["play", "time", "clock"].map((id) => document.getElementById(id));
  const first = videos[0];
  const trained = Number(first.dataset.trained);
  const frame = Number(time.step);
  let wanted = false;
  const show = () => {
    const now = Math.min(first.currentTime, Number(time.max));
    time.value = Math.floor(now / frame + 1e-6) * frame;
    clock.textContent = `${now.toFixed(1)} s`;
    time.setAttribute("aria-valuetext",
      `${now.toFixed(1)} seconds, ${now <= trained ? "within" : "beyond"} the training length`);
  };
  const seek = (seconds) => {
    // the middle of a frame, so that rounding lands on the same one everywhere
    const middle = (Math.floor(seconds / frame + 1e-6) + 0.5) * frame;
    const last = Number(time.max) - frame / 2;
    for (const video of videos) video.currentTime = Math.min(middle, last);
  };
  const set = async (on) => {
    wanted = on;
    play.textContent = on ? "Pause" : "Play";
    if (!on) {
      for (const video of videos) video.pause();
      seek(first.currentTime);
      return;
    }
    if (first.currentTime >= Number(time.max) - 1.5 * frame) seek(0);
    const started = await Promise.allSettled(videos.map((video) => video.play()));
    if (started.some((one) => one.status === "rejected")) set(false);
    else tick();
  };
  const tick = () => {
    if (!wanted) return;
    if (first.ended || first.currentTime >= Number(time.max) - frame / 4) {
      seek(0);
      first.play().catch(() => set(false));
    }
    for (const video of videos) {
      if (video === first) continue;
      const behind = first.currentTime - video.currentTime;
      if (Math.abs(behind) > frame) video.currentTime = first.currentTime;
      else video.playbackRate = 1 + Math.max(-0.25, Math.min(0.25, behind));
      if (video.paused) video.play().catch(() => set(false));
    }
    show();
    requestAnimationFrame(tick);
  };
  for (const video of videos) { video.controls = false; video.loop = false; }
  first.addEventListener("seeked", show);
  first.addEventListener("timeupdate", show);
  play.addEventListener("click", () => set(!wanted));
  time.addEventListener("input", () => { if (wanted) set(false); seek(Number(time.value)); });
  document.addEventListener("visibilitychange", () => { if (document.hidden && wanted) set(false); });
  transport.hidden = false;
  show();
})();
