"""How the page looks, in light and dark, wide and narrow."""

CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important;
  margin: 0 auto !important; }
.knn-unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; white-space: nowrap;
  clip-path: inset(50%); }
.knn-header h1 { font-size: 1.6rem; margin: .2rem 0; }
.gradio-container { --knn-quiet: #565d6b; }
.dark .gradio-container, .gradio-container.dark { --knn-quiet: #aeb5c2; }
.knn-header p, .knn-hint { color: var(--knn-quiet); margin: .1rem 0; }
.knn-empty { min-height: 180px; display: grid; place-items: center; text-align: center;
  border: 1px dashed var(--border-color-primary); border-radius: 12px; padding: 1.5rem;
  color: var(--knn-quiet); }
.knn-answer { display: flex; gap: 1.2rem; align-items: center; margin: .4rem 0 1rem; }
.knn-answer > img, .knn-answer > .knn-plain { width: 132px; height: 132px; object-fit: contain;
  border-radius: 12px; background: #fff; flex: none;
  border: 1px solid var(--border-color-primary); }
.knn-answer h2 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
.knn-score { font-size: 1.2rem; margin: .2rem 0; }
.knn-score .knn-hint { font-size: .85rem; }
.knn-notice { margin: .5rem 0 0; padding: .45rem .7rem; border-radius: 8px; color: #5c3b00;
  background: #fff1cc; border-left: 4px solid #d98a00; overflow-wrap: anywhere; }
.dark .knn-notice { color: #ffe3a6; background: #463005; }
#knn-page h3, #knn-near h3 { font-size: 1rem; margin: 1rem 0 .35rem; }
ul.knn-bars { list-style: none; margin: 0; padding: 0; }
.knn-bars li { display: grid; grid-template-columns: minmax(6rem, 38%) 1fr 3.6rem; gap: .6rem;
  align-items: center; margin: .2rem 0; padding: 0; }
.knn-name { overflow: hidden; overflow-wrap: anywhere; line-height: 1.2; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 3; }
.knn-value { text-align: right; font-variant-numeric: tabular-nums; }
.knn-bar { background: var(--border-color-primary); border-radius: 6px; height: .7rem;
  overflow: hidden; display: block; }
.knn-bar i { display: block; height: 100%; background: #4f6bed; border-radius: 6px; }
.knn-head .knn-bar i { background: #0f8a8a; }
.knn-knn .knn-bar i { background: #b6651d; }
.knn-voices { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr));
  gap: 0 1.5rem; }
.knn-report { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary);
  border-radius: 12px; background: #fff; }
.knn-map { margin: 0; background: #fff; border-radius: 12px; overflow: hidden; }
.knn-map svg { width: 100%; height: auto; display: block; }
.knn-map circle[data-row] { cursor: pointer; }
.knn-map circle[data-row]:hover { stroke: #1c2126; stroke-width: 2; }
#knn-rows .knn-tiles, #knn-taught .knn-tiles { max-height: 34rem; overflow-y: auto; }
.knn-groups { display: flex; flex-wrap: wrap; gap: .6rem; }
.knn-group { display: flex; flex-wrap: wrap; gap: .4rem; padding: .4rem;
  border: 1px solid var(--border-color-primary); border-radius: 12px; }
.knn-group .knn-tile { width: 104px; }
.knn-tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr));
  gap: .5rem; margin: .3rem 0; }
.knn-tile { margin: 0 !important; display: flex; flex-direction: column; gap: .1rem;
  align-items: stretch;
  padding: .35rem; border: 1px solid var(--border-color-primary); border-radius: 10px;
  cursor: pointer; background: var(--background-fill-primary); color: var(--body-text-color);
  text-align: left; min-width: 0; }
.knn-tile img, .knn-tile .knn-plain { width: 100%; aspect-ratio: 1; object-fit: contain;
  background: #fff; border-radius: 7px; margin: 0; }
.knn-plain { display: grid !important; place-items: center; color: #444;
  background: #e8eaf0 !important; font-variant-numeric: tabular-nums; }
.knn-tile b { font-size: .8rem; line-height: 1.2; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; }
details.knn-more summary { cursor: pointer; padding: .4rem 0; color: var(--knn-quiet); }
.knn-tile span:not(.knn-plain) { font-size: .72rem; color: var(--knn-quiet); }
.knn-tile:hover { border-color: #4f6bed; }
.knn-tile:focus-visible { outline: 3px solid #4f6bed; outline-offset: 1px; }
.knn-tile[aria-pressed="true"] { border-color: #4f6bed; box-shadow: 0 0 0 2px #4f6bed inset; }
.knn-tiles:has(.knn-small) { grid-template-columns: repeat(6, minmax(0, 52px)); gap: .4rem; }
.knn-tiles.knn-strip { grid-auto-flow: column; grid-template-columns: none; grid-auto-columns: 82px;
  overflow-x: auto; padding-bottom: .4rem; }
dialog.knn-detail { position: fixed; inset: 0; margin: auto !important; padding: 1rem;
  width: min(680px, 94vw); height: fit-content; max-height: 92vh;
  overflow-y: auto; border: 1px solid var(--border-color-primary); border-radius: 14px;
  background: var(--background-fill-primary); color: var(--body-text-color); }
dialog.knn-detail::backdrop { background: rgb(10 14 24 / .55); }
.knn-detail form { position: sticky; top: 0; height: 0; display: flex; justify-content: flex-end;
  z-index: 1; }
.knn-detail form button { width: 2.2rem; height: 2.2rem; border-radius: 50%; cursor: pointer;
  flex: none; display: grid; place-items: center; padding: 0;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color);
  background: var(--background-fill-primary); }
.knn-detail form button:focus-visible { outline: 3px solid #4f6bed; outline-offset: 1px; }
.knn-detail .knn-answer > img, .knn-detail .knn-answer > .knn-plain { width: 240px;
  height: 240px; }
.knn-detail .knn-answer h3 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
.knn-detail .knn-answer > div { padding-right: 2.2rem; }
#knn-said { min-height: 2.4rem; }
#knn-upload, #knn-lessons { min-height: 170px; }
@media (max-width: 480px) {
  .tab-container button { padding: 0 .55rem !important; }
  .knn-tiles:not(.knn-strip, :has(.knn-small)) { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .knn-answer > img, .knn-answer > .knn-plain { width: 96px; height: 96px; }
  .knn-answer h2 { font-size: 1.35rem; }
  .knn-header h1 { font-size: 1.3rem; }
  .knn-header p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
    overflow: hidden; }
  .knn-detail .knn-answer { display: block; }
}
"""

HEAD = """
<script>
document.addEventListener('paste', (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  const shown = [...document.querySelectorAll('#knn-upload, #knn-lessons')]
    .find((one) => one.offsetParent);
  const input = shown?.querySelector('input[type=file]');
  if (!files.length || !input || event.target.closest?.('textarea, input')) return;
  const sent = new DataTransfer();
  files.forEach((file) => sent.items.add(file));
  input.files = sent.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
});
</script>
"""
"""A picture that is pasted anywhere goes where an upload goes on the tab that is open."""
