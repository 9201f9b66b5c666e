"""The bundled tiny family: four small Llamas trained on a synthetic world, and programs that grade their answers.

`bundled(member)` is a model's folder, `bundled_record()` its measurements; `NOTES.md` says what was held out.
"""

from proxytune.demo.bundle import bundled, bundled_record

__all__ = ["bundled", "bundled_record"]
