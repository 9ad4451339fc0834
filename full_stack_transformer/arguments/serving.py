"""Options of the service and of the bot."""

import re
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.arguments.checks import (
    OwnClassesOptions,
    at_least,
    between,
    check_device,
    num_bytes,
)
from full_stack_transformer.arguments.models import AdapterArguments, DraftOptions, ModelArguments
from full_stack_transformer.arguments.sampling import SamplingOptions
from full_stack_transformer.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Engine."""

    max_batch_size: int = 32
    """Maximum texts generated together, per model. If their keys and values need more than --kv_memory,
    some wait for others."""
    max_queue_size: int = 64
    """Maximum waiting texts of one client, per model; further requests are answered 429. Clients are keys, or
    addresses without keys; as many places again are shared by the others."""
    max_length: int | None = None
    """Maximum tokens of prompt and answer together. Default: the model's context."""
    weights_dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """Type of the weights. auto: bfloat16 if the hardware supports it. int8 and int4: smaller and faster,
    with a loss of quality that fst evaluate --weights_dtype measures."""
    kv_memory: str | None = None
    """Memory for keys and values of all models together, such as 2GB; it is taken as texts need it. Default:
    70 % of what is free at the start, at most what --max_batch_size texts of full length need."""
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type of keys and values. auto: float32 beside float32 weights, else bfloat16. int8 takes half the
    memory of bfloat16, with a small loss of quality that fst evaluate --kv_dtype int8 measures."""
    prefix_cache: Literal["shared", "per_key", "off"] = "per_key"
    """Who need not read again a beginning that has been read: shared: everybody; a client can then tell by
    time what others asked. per_key: requests with the same API key; without keys everybody. off: only the n
    texts of one request."""
    device: str = "auto"
    """Device: auto, cpu, cuda or mps."""
    workers: int = 1
    """Always 1: one process owns the device. For more use --replicas, or several services behind a load
    balancer."""


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Access."""

    api_keys_file: Path | None = None
    """File with one key per line, or sha256: and its digest. The environment variable FST_API_KEYS adds
    keys, separated by commas. With keys, everything except /health, /ready and the page at / requires
    one."""
    admin_keys_file: Path | None = None
    """The same of keys that may also load and unload adapters, with the environment variable FST_ADMIN_KEYS.
    Without any nobody may."""
    allowed_hosts: tuple[str, ...] = ()
    """Name by which clients reach the service, such as models.example.org, *.example.org, or * for any; may
    be repeated. Always allowed: localhost, --host, the hosts of --allowed_origins; with --host 0.0.0.0 also
    any IP address and the name of this machine."""
    allowed_origins: tuple[str, ...] = ()
    """Origin whose web pages may call the service from a browser, such as https://example.org; * for all;
    may be repeated."""


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Limits."""

    request_timeout_seconds: float = 600.0
    """Maximum seconds of a request, queued plus running."""
    header_timeout_seconds: float = 10.0
    """Maximum seconds to receive the headers of a request."""
    body_timeout_seconds: float = 30.0
    """Maximum seconds to receive the body of a request."""
    max_body_bytes: int = 1_048_576
    """Maximum bytes of a request body."""
    strict_fields: bool = False
    """Reject requests with fields that the service does not know. By default it ignores them and names
    them in the header X-Ignored-Fields and once in the log."""
    shutdown_seconds: float = 20.0
    """Seconds that running requests have to finish after SIGTERM; then they end with an error."""
    shutdown_delay_seconds: float = 0.0
    """Seconds after SIGTERM in which /ready answers 503 and new requests are still taken, so that a load
    balancer stops sending them first. Default: 0, for a service without one."""


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """Replicas on a Ray cluster."""

    ray_address: str | None = None
    """Serve with replicas on Ray: auto or HOST:PORT for a running cluster, local for one on this machine.
    The model must have the same path on every node. Default: serve in this process."""
    replicas: str = "1"
    """Number of replicas, each with models of its own; MIN:MAX for as many as the load needs."""
    routing: Literal["beginning", "queue"] = "beginning"
    """Which replica gets a request. beginning: the one that has read how its text begins, unless its queue is
    longer than the shortest by half of --max_batch_size. queue: the one with the shortest queue."""
    cpus_per_replica: int = 1
    """CPU cores that a replica reserves and computes with."""
    gpus_per_replica: float | None = None
    """GPUs that a replica reserves. Default: 1 if the cluster has any and --device allows it."""

    @property
    def replica_bounds(self) -> tuple[int, int]:
        """Fewest and most replicas.

        Raises:
            UsageError: --replicas is neither N nor MIN:MAX.
        """
        found = re.fullmatch(r"([0-9]{1,4})(?::([0-9]{1,4}))?", self.replicas)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= low <= high:
            raise UsageError(
                f"--replicas must be N or MIN:MAX, with 1 <= MIN <= MAX, found {self.replicas!r}"
            )
        return low, high

    def check_replicas(self) -> None:
        """Raise UsageError for values that can never work."""
        at_least(self, 1, "cpus_per_replica")
        if self.gpus_per_replica is not None:
            at_least(self, 0, "gpus_per_replica")
        if self.replica_bounds != (1, 1) and self.ray_address is None:
            raise UsageError(
                "--replicas needs --ray_address, such as --ray_address local; without Ray run several "
                "services behind a load balancer"
            )


@dataclass(frozen=True, kw_only=True)
class ServedAdapterOptions:
    """Adapters (LoRA)."""

    adapters: tuple[str, ...] = ()
    """NAME=PATH of an adapter directory, or of an experiment that trained one, to serve beside its base as a
    model of its own; BASE:NAME=PATH names the base, where several models are served; may be repeated."""
    adapters_root: Path | None = None
    """Directory below which POST /v1/load_lora_adapter finds adapters. Default: it loads none."""
    max_adapters: int = 64
    """Maximum adapters at once, up to 256."""

    def check_adapters(self) -> None:
        """Raise UsageError for values that can never work."""
        between(self, 0, 256, "max_adapters")
        for word in self.adapters:
            name, _, path = word.partition("=")
            if not name or not path:
                raise UsageError(f"--adapters must be NAME=PATH, found {word!r}")


@dataclass(frozen=True)
class ServeArguments(
    EngineOptions,
    DraftOptions,
    ServedAdapterOptions,
    AccessOptions,
    LimitOptions,
    ReplicaOptions,
    OwnClassesOptions,
    AdapterArguments,
    ModelArguments,
):
    """Serve a model over HTTP with an OpenAI-compatible API."""

    _: KW_ONLY
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces."""
    port: int = 9228
    """Port to listen on; 0 for any free port."""
    served_model_name: str | None = None
    """Name of the model for clients. Default: the name of its experiment or directory."""
    more_models: tuple[str, ...] = ()
    """NAME=PATH of another model to serve; may be repeated."""
    watch: bool = False
    """Reload the model between requests when training writes a better one."""
    log_format: Literal["text", "json"] = "text"
    """json: one JSON line per request with sizes, times and outcome, never texts."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        check_device(self)
        self.check_draft()
        self.check_adapters()
        self.check_replicas()
        between(self, 0, 65535, "port")
        at_least(self, 1, "max_batch_size", "max_body_bytes")
        at_least(self, 0, "max_queue_size", "shutdown_seconds", "shutdown_delay_seconds")
        at_least(self, 0.01, "request_timeout_seconds", "header_timeout_seconds")
        at_least(self, 0.01, "body_timeout_seconds")
        if self.max_length is not None:
            at_least(self, 2, "max_length")
        if self.kv_memory is not None:
            num_bytes(self.kv_memory, "kv_memory")
        for host in self.allowed_hosts:
            if re.search("[/:@ ]", host) and not host.startswith("["):
                raise UsageError(
                    f"--allowed_hosts must be a name without scheme and port, found {host!r}"
                )
        for word in self.more_models:
            name, _, path = word.partition("=")
            if not name or not path:
                raise UsageError(f"--more_models must be NAME=PATH, found {word!r}")
        if self.ray_address is not None and self.adapters_root is not None:
            raise UsageError(
                "--adapters_root cannot be used with --ray_address: a request that loads an adapter would "
                "reach one replica only; name the adapters with --adapters"
            )
        if self.workers != 1:
            raise UsageError(
                f"--workers {self.workers}: one process owns the device and generates for all requests "
                "together, so a second one would only compete with it; use --replicas with --ray_address, or "
                "run one service per device, each with its own --port, behind a load balancer"
            )


@dataclass(frozen=True, kw_only=True)
class BotAccessOptions:
    """Access."""

    allowed_ids: tuple[int, ...] = ()
    """ID of a user or chat that may use the bot; may be repeated. Without any, everybody may."""
    admin_ids: tuple[int, ...] = ()
    """ID of a user without limits, who may use /allow and /deny; may be repeated."""
    max_tokens_per_day: int = 0
    """Maximum number of new tokens per user and day (UTC); 0 for no limit."""


@dataclass(frozen=True, kw_only=True)
class TelegramApiOptions:
    """Telegram API."""

    telegram_api_base: str = "https://api.telegram.org"
    """URL of the Bot API server, such as a local one."""
    webhook_url: str | None = None
    """Public https URL at which Telegram delivers updates; without it the bot polls. The environment
    variable TELEGRAM_WEBHOOK_SECRET must hold a secret of at least 16 letters, digits, - or _."""
    webhook_host: str = "127.0.0.1"
    """Address on which the webhook listens, behind a proxy with a certificate."""
    webhook_port: int = 8443
    """Port on which the webhook listens; 0 for any free one."""


@dataclass(frozen=True, kw_only=True)
class MonitoringOptions:
    """Monitoring."""

    monitoring_port: int | None = None
    """Port on 127.0.0.1 for /health and Prometheus /metrics; 0 for any free one. Off by default."""
    log_texts: bool = False
    """Log prompts and texts, and say so in /privacy; by default only their lengths are logged."""


@dataclass(frozen=True)
class TelegramBotArguments(
    SamplingOptions,
    BotAccessOptions,
    TelegramApiOptions,
    MonitoringOptions,
    OwnClassesOptions,
    AdapterArguments,
):
    """Answer Telegram messages with texts of a model; pending replies are stored in SQLite."""

    _: KW_ONLY
    service_url: str = "http://127.0.0.1:9228"
    """URL that `fst serve` printed, or of any OpenAI-compatible server such as vLLM. The environment
    variable SERVICE_API_KEY holds its key if it needs one."""
    checkpoint: Path | None = None
    """Model directory, experiment directory, .ckpt file or adapter directory; the bot starts a service for
    it."""
    device: str = "auto"
    """Device of the service of --checkpoint: auto, cpu, cuda, mps."""
    token_file: Path | None = None
    """File with the bot's token; without it the environment variable TELEGRAM_BOT_TOKEN is read."""
    database: Path = Path("data/telegram_bot.sqlite3")
    """SQLite file for pending replies, settings and conversations; a second process of the bot
    with the same file stands by."""
    mode: Literal["auto", "continue", "chat"] = "auto"
    """Default mode of a chat: continue a message, or answer it. auto: chat if the service reports a chat
    template, else continue."""
    system_prompt: str | None = None
    """System prompt of all conversations; a chat may set its own with /system."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        self.sampling()
        check_device(self)
        at_least(self, 0, "max_tokens_per_day")
        between(self, 0, 65535, "webhook_port")
        if self.monitoring_port is not None:
            between(self, 0, 65535, "monitoring_port")
