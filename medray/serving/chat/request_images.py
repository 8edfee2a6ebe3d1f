"""Images of requests: data URIs, and https addresses of hosts that were named; decoded here, so the
engine never parses untrusted files.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urljoin, urlsplit

from medray.config import DataConfig
from medray.config.serving import LimitsConfig
from medray.serving.chat.request import ApiError

# RFC 2397: a media type, its parameters, then the marker. Browsers also read blanks between them, and data of
# no or of an unspecific type.
_DATA = re.compile(
    r"data:(image/[a-z0-9.+-]{1,64}|application/octet-stream|)(;[a-z0-9._-]{1,64}=[^;,]{0,128})*;base64,",
    re.IGNORECASE,
)
_LONGEST_HEAD = 1024  # characters before the data; a pattern may take long over more
_BLANKS = re.compile(r"[ \t\r\n\f]+")
_STANDARD = bytes.maketrans(b"-_", b"+/")  # RFC 4648, section 5
_REDIRECTS = 3
_DECODED_AT_ONCE = 4  # images; one of the largest takes up to a gigabyte meanwhile
Resolve = Callable[[str, int], Awaitable[list[str]]]


async def public_addresses(host: str, port: int) -> list[str]:
    """The IP addresses of a host. Raises ApiError where one of them is private, loopback, link-local or
    otherwise not public.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ApiError(f"the host {host} is not known", code="image_unavailable") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise ApiError(f"images are not fetched from {host}", code="host_not_allowed")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; addresses that carry an IPv4 one inside are
    judged by that too.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = (
        getattr(ip, "ipv4_mapped", None)
        or getattr(ip, "sixtofour", None)
        or (getattr(ip, "teredo", None) or (None, None))[1]
    )
    if isinstance(ip, ipaddress.IPv6Address) and ip in ipaddress.ip_network("64:ff9b::/96"):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast and (inner is None or is_public(str(inner)))


class ImageLoader:
    """URL of a request's image -> data URI of a PNG that was made here.

    Args:
        resolve: host and port -> addresses that may be connected to; raises ApiError.
        tls: of connections to the hosts (default: the system's authorities).
    """

    def __init__(
        self, limits: LimitsConfig, resolve: Resolve = public_addresses, tls: ssl.SSLContext | None = None
    ):
        self.limits, self.resolve, self.tls = limits, resolve, tls
        self.decoding = DataConfig(max_image_bytes=limits.image_bytes, max_image_pixels=limits.image_pixels)
        # Not a semaphore: a thread works on when the request that waits for it is given up.
        self.decoders = ThreadPoolExecutor(_DECODED_AT_ONCE, "decode")

    async def load(self, url: str, square: bool) -> str:
        """Raises ApiError (400) for an address that is not allowed, and for an image that cannot be had, is
        too large or is none.

        Args:
            square: pad the image to a square (LLaVA's image_aspect_ratio=pad), made smaller first where that
                would have more than image_pixels.
        """
        url = url.strip()
        if url[:5].lower() == "data:":
            data = self._of_data_uri(url)
        elif url[:8].lower() == "https://" and self.limits.hosts:
            data = await self._fetched(url)
        else:
            allowed = f" or https://, from {', '.join(self.limits.hosts)}" if self.limits.hosts else ""
            raise ApiError(
                f"an image's url must be a data URI (data:image/png;base64,...){allowed}",
                code="invalid_image_url",
            )
        return await asyncio.get_running_loop().run_in_executor(self.decoders, self._encoded, data, square)

    def _of_data_uri(self, url: str) -> bytes:
        """The bytes of a data URI. Line breaks and blanks (RFC 2045), percent escapes, the URL-safe
        alphabet and missing padding are read too.
        """
        head = url[: url.find(",", 0, _LONGEST_HEAD) + 1]
        if not _DATA.fullmatch(_BLANKS.sub("", head)):
            raise ApiError(
                "a data URI of an image begins with data:image/TYPE;base64,", code="invalid_image_url"
            )
        text = url[len(head) :]
        text = _BLANKS.sub("", unquote(text) if "%" in text else text)
        if 3 * (len(text) - text[-2:].count("=")) // 4 > self.limits.image_bytes:
            raise ApiError(f"the image is larger than {self.limits.image_bytes} bytes", code="limit_exceeded")
        try:
            standard = text.encode("ascii").translate(_STANDARD)
            return base64.b64decode(standard + b"=" * (-len(standard) % 4), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise ApiError("the image's data is not base64", code="invalid_image_url") from None

    async def _fetched(self, url: str) -> bytes:
        import httpx

        try:
            async with asyncio.timeout(self.limits.fetch_seconds):
                # trust_env: no proxy of the environment may be told to fetch it instead.
                async with httpx.AsyncClient(
                    verify=self.tls or ssl.create_default_context(),
                    trust_env=False,
                    timeout=self.limits.fetch_seconds,
                ) as client:
                    for _ in range(_REDIRECTS + 1):
                        data, url = await self._once(client, url)
                        if data is not None:
                            return data
        except TimeoutError:
            raise ApiError(
                f"the image was not there within {self.limits.fetch_seconds:g} seconds",
                code="image_unavailable",
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError):
            raise ApiError("the image cannot be fetched from its host", code="image_unavailable") from None
        raise ApiError(f"the image's address leads on more than {_REDIRECTS} times", code="image_unavailable")

    async def _once(self, client: object, url: str) -> tuple[bytes | None, str]:
        """One request: the data, or where it leads on."""
        host, port = self._allowed(url)
        address = (await self.resolve(host, port))[0]
        # Connected to the address that was checked: a name may be resolved to another one the next time.
        parts = urlsplit(url)
        literal = f"[{address}]" if ":" in address else address
        target = parts._replace(netloc=f"{literal}:{port}", fragment="").geturl()
        headers = {
            "Host": parts.netloc,
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "User-Agent": "medray",
        }
        async with client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as answer:
            if answer.is_redirect:
                try:
                    return None, urljoin(url, answer.headers.get("location", ""))
                except ValueError:
                    raise ApiError(
                        "the image's address leads on to one that is none", code="image_unavailable"
                    ) from None
            if answer.status_code != 200:
                raise ApiError(
                    f"the image's host answered with {answer.status_code}", code="image_unavailable"
                )
            data = bytearray()
            async for chunk in answer.aiter_raw():
                data += chunk
                if len(data) > self.limits.image_bytes:
                    raise ApiError(
                        f"the image is larger than {self.limits.image_bytes} bytes", code="limit_exceeded"
                    )
            return bytes(data), url

    def _allowed(self, url: str) -> tuple[str, int]:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port or 443
        except ValueError:
            raise ApiError("invalid image URL", code="invalid_image_url") from None
        named = host if port == 443 else f"{host}:{port}"
        # ASCII: lower() makes letters of others, such as the k of a kelvin sign.
        if (
            parts.scheme != "https"
            or parts.username is not None
            or parts.password is not None
            or not parts.netloc.isascii()
            or named not in self.limits.hosts
        ):
            raise ApiError(f"images are not fetched from {named or url[:40]}", code="host_not_allowed")
        return host, port

    def _encoded(self, data: bytes, square: bool) -> str:
        from medray.images.decoding import ImageError, decode, pad_to_square, png_url

        try:
            image = decode(data, self.decoding)
        except ImageError as error:
            message = str(error).replace("data.max_image_bytes ", "").replace("data.max_image_pixels ", "")
            raise ApiError(message, code="invalid_image") from None
        return png_url(
            pad_to_square(image, max_pixels=self.limits.image_pixels) if square else image, compress_level=1
        )
