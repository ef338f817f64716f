"""Where the CUDA toolkit is."""

import os
import re
import shutil
import subprocess
from pathlib import Path


def find_toolkit(file: str, *others: str) -> Path | None:
    """The toolkit's folder, if there is one with `file` in it.

    CUDA_HOME and CUDA_PATH name it, or nvcc, which may be a wrapper script that lies elsewhere;
    after these come `others`.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if shutil.which("nvcc"):
        command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        steps = subprocess.run(command, capture_output=True, text=True).stderr
        homes += [top.strip() for top in re.findall(r"^#\$ TOP=(.+)$", steps, re.M)]
    for home in filter(None, [*homes, *others]):
        if (Path(home) / file).exists():
            return Path(home).resolve()
    return None
