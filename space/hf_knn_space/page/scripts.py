"""What runs in the browser."""

SELECT_JS = """
let pressed = '';
element.addEventListener('click', (event) => {
  const tile = event.target.closest('[data-row], [data-look]');
  if (!tile) return;
  const {row, look} = tile.dataset;
  pressed = row === undefined ? `[data-look="${look}"]` : `[data-row="${row}"]`;
  trigger('click', {row: row ?? null, look: look ?? null});
});
watch('value', () => setTimeout(() => {
  if (pressed && document.activeElement === document.body) element.querySelector(pressed)?.focus();
}));
"""
"""A click on a tile says which one; if the page is drawn anew it keeps the focus."""

ANNOUNCE_JS = """
const status = document.createElement('div');
status.className = 'knn-unseen';
status.setAttribute('role', 'status');
element.parentElement.append(status);
let seen = '';
watch('value', () => setTimeout(() => {
  status.textContent = element.querySelector('[data-announce]')?.dataset.announce ?? '';
  const asked = element.querySelector('.knn-answer > img')?.src ?? '';
  if (asked !== seen && element.getBoundingClientRect().top > innerHeight / 2)
    element.scrollIntoView({behavior: 'smooth'});
  seen = asked;
}));
"""
"""A new answer is read out by a screen reader: in one sentence, not the whole page of it. Where it
is below the fold, on a phone, it is scrolled into view; the same picture answered anew is not."""

DIALOG_JS = """
let opener = null;
watch('value', () => setTimeout(() => {
  const dialog = element.querySelector('dialog');
  if (!dialog) { opener = null; return; }
  opener ??= document.activeElement;
  dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener('close', () => {
    opener?.focus();
    props.value = '';  // the same picture can be opened again
  });
  dialog.showModal();
}));
"""
"""What is filled in opens over the page; the focus goes back to where it came from."""
