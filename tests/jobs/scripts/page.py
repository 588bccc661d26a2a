"""Run each section of a page of examples in FOLDER, and say how it ended: `page.py PAGE FOLDER`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from support.pages import sections


def main() -> None:
    page, folder = map(Path, sys.argv[1:])
    os.chdir(folder)
    (_, shared), *rest = sections(page)
    ended: dict[str, str] = {}
    dist.init_process_group("gloo")
    # Accelerate keeps its settings of this process for good, so its section comes last.
    for title, code in sorted(rest, key=lambda section: section[0] == "Accelerate"):
        torch.manual_seed(0)
        ended[title] = "did not end"
        try:
            exec(compile(f"{shared}\n{code}", title, "exec"), {"__name__": "__main__"})  # noqa: S102 - the test's purpose
            ended[title] = "well"
        except Exception:
            ended[title] = traceback.format_exc()
            raise
        finally:
            (folder / f"ended.rank{dist.get_rank()}.json").write_text(json.dumps(ended))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
