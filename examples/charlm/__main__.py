"""`python examples/charlm`: the main job."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # this folder is the package `charlm`

try:
    from charlm.cli import main
except ImportError as error:
    if (error.name or "").split(".")[0] not in ("matplotlib", "rich"):
        raise
    sys.exit(f"charlm draws with {error.name}, which is missing: pip install -e '.[examples]'")

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; --resume continues from the last checkpoint")
