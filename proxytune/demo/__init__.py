"""The bundled tiny family: four small Llamas trained on a synthetic world, and programs that grade their answers.

`bundled` gives a member's folder, `bundled_record` the family's measurements; `NOTES.md` says what was held out.
"""

from proxytune.demo.bundle import bundled, bundled_record

__all__ = ["bundled", "bundled_record"]
