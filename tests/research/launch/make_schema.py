"""Write jobset-v1alpha2.json.gz from JobSet's own definition: its schema, without the prose.

    git clone https://github.com/kubernetes-sigs/jobset
    python make_schema.py jobset/config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml

What is here was made from commit 08dfbdfd682714a9ab929633eca8dc95315187e7 (Apache-2.0).
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml


def strict(schema: Any) -> Any:
    """``schema`` without descriptions, refusing fields that it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        name: {field: strict(inner) for field, inner in value.items()}
        if name == "properties" and isinstance(value, dict)
        else strict(value)
        for name, value in schema.items()
        if name != "description"
    }
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        kept["additionalProperties"] = False
    return kept


if __name__ == "__main__":
    versions = yaml.safe_load(Path(sys.argv[1]).read_text())["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1alpha2")
    text = json.dumps(strict(schema), separators=(",", ":"), sort_keys=True)
    path = Path(__file__).with_name("jobset-v1alpha2.json.gz")
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
