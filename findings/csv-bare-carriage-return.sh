#!/usr/bin/env bash
# A cell with a carriage return in it, written and read back by pandas.
#
# A good engineer would guess that to_csv quotes every cell that read_csv would otherwise split. With the lineterminator "\n" a
# lone carriage return is not quoted, and read_csv takes it for the end of a row: the table comes back with a row more.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet pandas==3.1.1
venv/bin/python - <<'PYTHON'
import io
import sys

import pandas as pd

table = pd.DataFrame({"token": ["a\rb", "c"], "count": [1, 2]})
text = table.to_csv(index=False, lineterminator="\n")
back = pd.read_csv(io.StringIO(text, newline=""))
print("pandas", pd.__version__)
print("written:", repr(text))
print("rows written:", len(table), "| rows read:", len(back))
sys.exit(0 if '"a\rb"' not in text and len(back) != len(table) else 1)
PYTHON
