"""A W&B on this machine: it answers what the pinned client asks, and keeps what the client sends."""

import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4  # of the form that the client takes for a key


@dataclass
class ArrivedRun:
    """A run as its page would show it."""

    fields: dict[str, Any] = field(default_factory=dict)  # groupName, displayName, jobType, sweep, …
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # of each streamed file, by number
    exit_code: int | None = None
    uploads: set[str] = field(default_factory=set)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.lines.get("wandb-summary.json", {}).get(0, "{}"))


class WandbServer:
    """Serves on a free port until `stop`. `status` and `delay` (seconds) make it ill or slow at any time."""

    def __init__(self) -> None:
        self.status, self.delay = 200, 0.0
        self.runs: dict[str, ArrivedRun] = {}
        self.views: list[dict[str, Any]] = []  # saved workspaces
        self.sweep = ""  # its config, as YAML
        self.commands: list[dict[str, Any]] = []  # for a sweep's agent, handed out one by one
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(server.delay)
                status, answer = server.status, {}
                if status == 200:
                    answer = server.respond(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *arguments: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *arguments: Any) -> None:
                pass  # a client that gave up waiting

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def respond(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            assert operation
            return {"data": self._graphql(operation[1], request.get("variables") or {})}
        if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            run, sent = self.runs[stream[1]], json.loads(body)
            for name, chunk in (sent.get("files") or {}).items():
                run.lines.setdefault(name, {}).update(enumerate(chunk["content"], chunk["offset"]))
            if sent.get("complete"):
                run.exit_code = sent["exitcode"]
        elif upload := re.fullmatch(r"/upload/([^/]+)/(.+)", path):
            self.runs[upload[1]].uploads.add(upload[2])
        return {}

    def _graphql(self, operation: str, sent: dict[str, Any]) -> dict[str, Any]:
        match operation:
            case "Viewer" | "GetDefaultEntity":
                return {"viewer": {"id": "1", "entity": "us", "username": "us", "teams": {"edges": []}}}
            case "RunResumeStatus":
                run = self.runs.get(sent["name"])
                return {"model": {"bucket": run and _resumable(run)}}
            case "UpsertBucket":
                run = self.runs.setdefault(sent["name"], ArrivedRun())
                run.fields |= {key: value for key, value in sent.items() if value is not None}
                run.config = json.loads(sent["config"] or "null") or run.config
                project = {"name": sent["project"], "entity": {"name": "us"}}
                return {"upsertBucket": {"bucket": {"id": "1", "name": sent["name"], "project": project}}}
            case "CreateRunFiles":
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{sent['run']}/{name}"}
                    for name in sent["files"]
                ]
                return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":  # as if it were there already: nothing of it is uploaded then
                artifact = {"id": "1", "state": "COMMITTED", "artifactSequence": {"id": "1"}}
                return {"createArtifact": {"artifact": artifact}}
            case "UpsertView2":
                self.views.append(sent)
                return {"upsertView": {"view": {"id": "1", "name": sent["name"]}, "inserted": True}}
            case "UpsertSweep":
                self.sweep = sent["config"]
                project = {"name": sent["projectName"], "entity": {"name": "us"}}
                return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}}}
            case "SweepWithRuns":
                return {"project": {"sweep": {"config": self.sweep, "runs": {"edges": []}}}}
            case "CreateAgent":
                return {"createAgent": {"agent": {"id": "1"}}}
            case "Heartbeat":
                command = self.commands.pop(0) if self.commands else {"type": "exit"}
                waits = "true" in sent["runState"]  # a run is going on
                if waits:
                    self.commands.insert(0, command)
                return {"agentHeartbeat": {"commands": json.dumps([] if waits else [command])}}
        return {"project": None, "entity": None, "serverInfo": None}


def _resumable(run: ArrivedRun) -> dict[str, Any]:
    tails = {
        name: json.dumps([line for _, line in sorted(run.lines.get(f"wandb-{name}.jsonl", {}).items())][-1:])
        for name in ("history", "events")
    }
    counts = {name: len(run.lines.get(f"wandb-{name}.jsonl", {})) for name in ("history", "events")}
    return {
        "name": run.fields["name"],
        "summaryMetrics": json.dumps(run.summary),
        "config": json.dumps(run.config),
        "wandbConfig": '{"t": 1}',
        "logLineCount": 0,
        **{f"{name}LineCount": count for name, count in counts.items()},
        **{f"{name}Tail": tail for name, tail in tails.items()},
    }
