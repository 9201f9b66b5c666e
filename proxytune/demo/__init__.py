"""The bundled tiny family, and problems to ask it: `bundled` is a member's folder, `bundled_record` what was measured.

Four small Llamas trained on a synthetic world, with programs that grade their answers. `NOTES.md` says what was held
out.
"""

from proxytune.demo.bundle import bundled, bundled_record

__all__ = ["bundled", "bundled_record"]
