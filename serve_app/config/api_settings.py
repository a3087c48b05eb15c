"""The section `api` of the settings."""

from ipaddress import ip_network

from pydantic import Field, SecretStr, field_validator

from serve_app.config.section import Section, items


class ApiSettings(Section):
    """The limits of requests, and the API keys."""

    keys: SecretStr | None = None
    """Accepted API keys, comma separated. Read from the environment only. Without this and
    `keys_file`, clients need no key."""
    keys_file: str | None = None
    """File of API keys with names and limits, which `mixtral-serve keys` writes. The server reads
    it again when it changes."""
    cors_origins: str | None = None
    """Origins of web pages that may call the API from a browser, comma separated, such as
    `https://chat.example.com`; `*` allows every origin. None: no other origin."""
    max_tokens_limit: int | None = Field(default=None, ge=1)
    """The largest `max_tokens` that a request may have. None: what the context holds."""
    max_prompt_chars: int = Field(default=100_000, ge=1)
    """Maximum number of characters of a prompt, or of all messages together. A longer prompt gets
    400."""
    max_prompts: int = Field(default=1000, ge=1)
    """Maximum number of prompts in a list (`prompts` or `items` of `/prompt`). A longer list gets
    400."""
    max_body_bytes: int = Field(default=8_000_000, ge=1024)
    """Maximum bytes of the body of a request or job. A larger body gets 413."""
    sanitize_control_tokens: bool = True
    """Whether a control token in a message, such as `</s>`, is plain text. With false it is the
    control token, as in transformers' `apply_chat_template`. Raw prompts may always contain control
    tokens."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Maximum seconds from the arrival of a request to its end. Then it ends with 504."""
    retry_after_s: int = Field(default=1, ge=1)
    """Minimum seconds in `Retry-After` of a 429 for a full request queue, and the value of a 503
    while the server shuts down. A slow engine gives longer ones, up to 60."""
    max_connections: int = Field(default=4096, ge=16)
    """Maximum number of open connections to HAProxy. Further ones wait until one closes."""
    max_connections_per_address: int | None = Field(default=None, ge=1)
    """Maximum number of open connections to HAProxy from one address. Further ones are closed.
    None: no limit, because all clients behind a load balancer have its address."""
    trusted_proxies: str | None = None
    """Addresses or networks without `max_connections_per_address`, comma separated, such as
    `10.0.0.0/8`."""

    @field_validator("keys")
    @classmethod
    def _has_a_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not items(value.get_secret_value()):
            raise ValueError("it must hold a key")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: str | None) -> str | None:
        for network in items(value):
            ip_network(network, strict=False)  # its error names the value
        return value

    @property
    def needs_key(self) -> bool:
        """Whether HTTP clients need an API key."""
        return self.keys is not None or self.keys_file is not None

    @property
    def fixed_keys(self) -> list[str]:
        """The keys in `keys`."""
        return items(None if self.keys is None else self.keys.get_secret_value())

    @property
    def allowed_origins(self) -> list[str]:
        """The origins in `cors_origins`; `["*"]` allows every origin."""
        origins = items(self.cors_origins)
        return ["*"] if "*" in origins else origins

    @property
    def trusted_networks(self) -> list[str]:
        """The networks in `trusted_proxies`."""
        return items(self.trusted_proxies)
