"""What compare.py measured, as a table in Markdown, as JSON and as a chart."""

import json
import statistics
from pathlib import Path
from typing import Any

import machine
from chart import draw

_SPARE = 100e6  # bytes that our process may take beyond torch, file and KV cache


def write_report(results: dict[str, Any], stem: Path) -> str:
    """Writes ``stem``.md, .json and .svg; returns the Markdown."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(results)
    stem.with_name(stem.name + ".md").write_text(text)
    stem.with_name(stem.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_name(stem.name + ".svg").write_text(draw(results))
    return text


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Comparison with other engines",
        "",
        machine.one_line(results["machine"]) + ".",
        "",
        f"{results['threads']} threads, CPUs {results['cores'] or 'not pinned'};"
        f" `{results['machine']['command']}`",
        "",
        *_versions(results),
        "",
        "Medians over the rounds. The ratios are ours to the other engine, medians of the rounds'"
        " own ratios with the smallest and the largest. A checked engine's every token is, by exact"
        " logits, the first choice or as many standard deviations behind it at most.",
        "",
        *_summary(results),
    ]
    for model in results["models"]:
        lines += ["", *_model_table(model)]
    return "\n".join(lines) + "\n"


def _versions(results: dict[str, Any]) -> list[str]:
    """One line an engine, of the first model that it ran."""
    seen: dict[str, str] = {}
    for model in results["models"]:
        for engine in model["engines"]:
            more = [engine.get("kernels", "")]
            more += [f"{name}={value}" for name, value in engine.get("properties", {}).items()]
            if "torch" in engine:
                more.append(f"torch {engine['torch']}")
            told = ", ".join(part for part in more if part)
            seen.setdefault(engine["title"], f"- {engine['title']} {engine['version']}: {told}")
    return list(seen.values())


def _summary(results: dict[str, Any]) -> list[str]:
    """Every engine of ours against the best llama.cpp and against OpenVINO."""
    lines = [
        "| model | engine | decode / best llama.cpp | prefill / OpenVINO | share of read probe"
        " | peak RSS / allowed, MB |",
        "|---|---|---|---|---|---|",
    ]
    for model in results["models"]:
        llamas = [e for e in model["engines"] if e["name"].startswith("llama")]
        best = max(llamas, key=lambda e: statistics.median(e["decode_tok_s"]), default=None)
        openvino = next((e for e in model["engines"] if e["name"] == "openvino"), None)
        probe = statistics.median(model["probe_gb_s"])
        for ours in (e for e in model["engines"] if e["is_ours"]):
            share = _gb_s(ours) / probe
            lines.append(
                f"| {model['title']} | {ours['title']} | {ratio(ours, best, 'decode_tok_s')}"
                f" | {ratio(ours, openvino, 'prefill_tok_s')} | {share:.2f} of {probe:.1f} GB/s"
                f" | {ours['memory']['VmHWM'] / 1e6:.0f} / {_allowed(ours) / 1e6:.0f} |"
            )
    return lines


def _model_table(model: dict[str, Any]) -> list[str]:
    ours = next((e for e in model["engines"] if e["is_ours"]), None)
    restarted = ", each engine loaded anew for its turn" if model["restarted_each_turn"] else ""
    lines = [
        f"## {model['title']}: prompt of {model['prompt_tokens']} tokens, then"
        f" {model['decode_tokens']} tokens, {len(model['probe_gb_s'])} rounds{restarted}",
        "",
        "| engine | prefill tok/s | decode tok/s | ours / it, prefill | ours / it, decode"
        " | MB a token | weights GB/s | peak RSS MB | checked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for engine in model["engines"]:
        lines.append(
            f"| {engine['title']} | {statistics.median(engine['prefill_tok_s']):.1f}"
            f" | {statistics.median(engine['decode_tok_s']):.2f}"
            f" | {ratio(ours, engine, 'prefill_tok_s')} | {ratio(ours, engine, 'decode_tok_s')}"
            f" | {engine['bytes_a_token'] / 1e6:.1f} | {_gb_s(engine):.2f}"
            f" | {engine['memory']['VmHWM'] / 1e6:.0f} | {_verdict(engine)} |"
        )
    return lines


def ratio(ours: dict[str, Any] | None, other: dict[str, Any] | None, key: str) -> str:
    """Median, smallest and largest of the rounds' ratios."""
    if ours is None or other is None or ours is other:
        return "-"
    ratios = [mine / theirs for mine, theirs in zip(ours[key], other[key], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _gb_s(engine: dict[str, Any]) -> float:
    return engine["bytes_a_token"] * statistics.median(engine["decode_tok_s"]) / 1e9


def _allowed(ours: dict[str, Any]) -> float:
    return float(ours["import_rss"] + ours["file_bytes"] + ours["kv_bytes"] + _SPARE)


def _verdict(engine: dict[str, Any]) -> str:
    if engine["problems"]:
        return "WRONG: " + "; ".join(engine["problems"])
    return f"{engine['largest_gap']:.4f}, {engine['first_choices']} first"
