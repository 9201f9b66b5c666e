"""Take the pictures of the page of a run: `python benches/page_pictures.py`, where a Chromium is installed.

Writes proxytune/view/pictures/: answers of the bundled family to three questions, in light, in dark and narrow.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import proxytune
from proxytune.demo import bundled
from proxytune.view import write_page

PICTURES = Path(__file__).parents[1] / "proxytune" / "view" / "pictures"
QUESTIONS = ("Use 11, 8, 9 to make 12.", "Start with 3. Add 5. What is the result?", "Where was Sibo Ketul born?")
SHOTS = {
    "light": ((960, 800), "token=17&theme=light"),
    "dark": ((960, 800), "colour=entropy&theme=dark"),
    "narrow": ((500, 900), "colour=decided&theme=light"),
}


def write(file: Path) -> None:
    """The page."""
    from transformers import AutoTokenizer

    model = proxytune.wrap(
        bundled("large-base"), expert=bundled("tiny-tuned"), antiexpert=bundled("tiny-base"), alpha=0.5, dtype="float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(bundled("large-base"), padding_side="left")
    prompts = [tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt") for question in QUESTIONS]
    with proxytune.record(model, tokenizer=tokenizer) as recording:
        for prompt in prompts:
            model.generate(**prompt, do_sample=False, max_new_tokens=40)
    forks = proxytune.ForkDecoding(threshold=0.7, branches=6, seed=0)
    out = model.generate(
        **prompts[0],
        do_sample=True,
        top_k=0,
        max_new_tokens=32,
        return_dict_in_generate=True,
        custom_generate=forks,
    )
    tree = out.trees[0].nested(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    write_page(recording.trace, file, title="The bundled family", trees=[tree])


def main() -> None:
    """Write the page, and photograph it."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    chromium = next(filter(None, found), None)
    if chromium is None:
        raise SystemExit("No chromium on the path.")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write(page)
        for name, ((width, height), place) in SHOTS.items():
            picture = PICTURES / f"{name}.png"
            command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=5000"]
            command += [f"--window-size={width},{height}", f"--screenshot={picture}", f"{page.as_uri()}#{place}"]
            subprocess.run(command, check=True, capture_output=True)
            print(f"{picture}: {picture.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
