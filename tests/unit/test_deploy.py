"""What deploy/ hands to Prometheus, Grafana and systemd, checked by their own tools; `tests/tools.sh` installs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator import metrics

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
DASHBOARD = ROOT / "deploy/grafana/dashboard.json"
UNIT = ROOT / "deploy/systemd/engine-orchestrator.service"


def run(tool: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    """The tool's output; fails with it when the tool is not content. Without the tool: skipped, in CI failed."""
    if shutil.which(tool) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{tool} is missing: run tests/tools.sh")
        pytest.skip(f"{tool} is missing: run tests/tools.sh")
    done = subprocess.run([tool, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def queries() -> list[str]:
    """Every query of the Grafana dashboard, with its variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace("$__rate_interval", "5m").replace("$product", ".*") for query in found]


def alerts() -> list[str]:
    return re.findall(r"- alert: (\w+)", (PROMETHEUS / "alerts.yml").read_text())


def test_alert_rules_are_valid_and_fire_when_they_should() -> None:
    assert f"{len(alerts())} rules found" in run("promtool", "check", "rules", PROMETHEUS / "alerts.yml")
    run("promtool", "test", "rules", "alerts_test.yml", cwd=PROMETHEUS)


def test_prometheus_configuration_is_valid(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        text = (PROMETHEUS / name).read_text()
        (tmp_path / name).write_text(re.sub(r"/etc/prometheus|/tmp", str(tmp_path), text))
    (tmp_path / "admin_key").write_text("key")
    run("promtool", "check", "config", tmp_path / "prometheus.yml")


def test_dashboard_queries_are_valid(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries())]
    # JSON is YAML, too.
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run("promtool", "check", "rules", tmp_path / "rules.yml")


def test_everything_asked_for_is_exposed() -> None:
    metrics.configure("memory")
    text = metrics.exposition(metrics.Fleet({("shop", "running"): 1}, {"shop": 0}, 0, 0), ["running"]).decode()
    exposed = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    asked = " ".join([*queries(), (PROMETHEUS / "alerts.yml").read_text()])
    names = set(re.findall(r"\borchestrator_\w+", asked))
    assert len(names) > 15
    for name in names:
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        assert {name, family, family.removesuffix("_total")} & exposed, name


def test_every_alert_has_its_page_in_the_runbook() -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/operate.md").read_text(), re.MULTILINE)
    assert set(alerts()) <= set(headings)


def test_systemd_unit_is_valid_and_leaves_engines_alone(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert "\nKillMode=process\n" in text
    unit = tmp_path / UNIT.name
    # The program must exist where the unit names it.
    unit.write_text(text.replace("/opt/engine-orchestrator/bin/orchestrator", "/bin/true"))
    assert "Unknown" not in run("systemd-analyze", "verify", unit)
