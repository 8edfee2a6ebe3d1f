"""Images of requests: what is fetched, from where, and what reaches an engine."""

import asyncio
import base64
import datetime
import http.server
import io
import ipaddress
import random
import ssl
import struct
import threading
import time
import zlib

import pytest
from PIL import Image

from medray.config.serving import LimitsConfig
from medray.serving.chat.request import ApiError
from medray.serving.chat.request_images import ImageLoader, is_public, public_addresses


def picture(size=(40, 20), kind="PNG", mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, size, 120 if mode == "L" else (200, 30, 30)).save(out, kind)
    return out.getvalue()


def data_uri(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def load(url, square=False, limits=None, **options):
    made = asyncio.run(ImageLoader(limits or LimitsConfig(), **options).load(url, square))
    head, _, rest = made.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(rest)))


def refusal(url, **options):
    with pytest.raises(ApiError) as error:
        load(url, **options)
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_data_uri_becomes_a_png_of_the_same_pixels(kind):
    image = load(data_uri(picture(kind=kind), kind.lower()))
    assert image.format == "PNG" and image.size == (40, 20) and image.mode == "RGB"
    assert all(
        abs(value - wanted) <= 8
        for value, wanted in zip(image.getpixel((20, 10)), (200, 30, 30), strict=True)
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda data: "data:image/png;base64," + base64.encodebytes(data).decode(),
        lambda data: "data:image/png;base64,\r\n" + base64.encodebytes(data).decode().replace("\n", "\r\n"),
        lambda data: "data:image/png;base64, " + base64.b64encode(data).decode() + "\n",
        lambda data: " " + data_uri(data) + "\n",
        lambda data: data_uri(data).replace("png;", "png;charset=utf-8;name=a b.png;"),
        lambda data: data_uri(data).replace(";base64", " ; BASE64"),
        lambda data: "data:image/png;base64," + base64.urlsafe_b64encode(data).decode(),
        lambda data: data_uri(data).rstrip("="),
        lambda data: (
            data_uri(data)
            .replace("+", "%2B")
            .replace("/", "%2F")
            .replace("=", "%3D")
            .replace("data:image%2Fpng", "data:image/png")
        ),
        lambda data: "data:;base64," + base64.b64encode(data).decode(),
        lambda data: "data:application/octet-stream;base64," + base64.b64encode(data).decode(),
        lambda data: data_uri(data, "jpg"),
        lambda data: data_uri(data, "x-icon"),
    ],
    ids=[
        "lines",
        "lines of CR LF",
        "blank first",
        "blank around",
        "parameters",
        "capitals",
        "URL-safe",
        "no padding",
        "percent",
        "no type",
        "bytes",
        "other name",
        "other type",
    ],
)
def test_a_data_uri_may_be_written_in_many_ways(write):
    rng = random.Random(0)
    noise = Image.frombytes("RGB", (40, 21), rng.randbytes(3 * 40 * 21))
    out = io.BytesIO()
    noise.save(out, "PNG")
    text = base64.b64encode(out.getvalue()).decode()
    assert "+" in text and "/" in text and text.endswith("="), "the picture shows nothing of these"
    assert load(write(out.getvalue())).tobytes() == noise.tobytes()


def test_models_tuned_on_squares_get_squares():
    assert load(data_uri(picture()), square=True).size == (40, 40)


def bomb():
    """A PNG of a few bytes that claims 30000 x 30000 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("/etc/passwd", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("http://example.org/a.png", "invalid_image_url"),
        ("https://example.org/a.png", "invalid_image_url"),
        ("s3://bucket/a.png", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("data:" + " " * 2_000_000, "invalid_image_url"),
        ("data:" + " " * 2_000_000 + ";base64,AAAA", "invalid_image_url"),
        ("data:;" + "a=;" * 500_000, "invalid_image_url"),
        ("data:text/html;base64,AAAA", "invalid_image_url"),
        ("data:image/png,AAAA", "invalid_image_url"),
        ("data:image/png;base64,***", "invalid_image_url"),
        ("data:image/png;base64,\u00e9", "invalid_image_url"),
        ("data:image/png;base64,", "invalid_image"),
        (data_uri(b"<svg/>", "svg+xml"), "invalid_image"),
        (data_uri(picture()[:60]), "invalid_image"),
        (data_uri(bomb()), "invalid_image"),
        (data_uri(picture(size=(4000, 1))), "invalid_image"),
    ],
)
def test_what_is_no_image_is_refused(url, code):
    error = refusal(url)
    assert error.code == code and "data.max" not in error.message and "/work" not in error.message


def test_an_image_over_the_limit_is_not_decoded():
    limits = LimitsConfig(image_bytes=1000)
    assert refusal(data_uri(b"x" * 1003), limits=limits).code == "limit_exceeded"
    assert refusal(data_uri(b"x" * 1000), limits=limits).code == "invalid_image"
    assert (
        "pixels"
        in refusal(data_uri(picture(size=(100, 100))), limits=LimitsConfig(image_pixels=9_999)).message
    )


def test_a_thin_image_does_not_become_a_huge_square():
    limits = LimitsConfig(image_pixels=20_000)
    for size in ((20, 1000), (1000, 20)):
        assert load(data_uri(picture(size=size)), square=True, limits=limits).size == (141, 141)
        assert load(data_uri(picture(size=size)), limits=limits).size == size
    assert load(data_uri(picture(size=(141, 140))), square=True, limits=limits).size == (141, 141)


def test_few_images_are_decoded_at_once(monkeypatch):
    at_work, most = [], []

    def encoded(loader, data, square):
        at_work.append(data)
        most.append(len(at_work))
        time.sleep(0.1)
        at_work.pop()
        return ""

    async def several():
        loader = ImageLoader(LimitsConfig())
        waiting = [asyncio.create_task(loader.load(data_uri(picture()), False)) for _ in range(8)]
        await asyncio.sleep(0.05)
        for task in waiting[:4]:
            task.cancel()  # their threads work on
        await asyncio.gather(*waiting, return_exceptions=True)

    monkeypatch.setattr(ImageLoader, "_encoded", encoded)
    asyncio.run(several())
    assert max(most) == 4 and len(most) == 8


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a01:203", False),
        ("64:ff9b::5db8:d822", True),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "[::1]".strip("[]")])
def test_names_of_this_machine_are_not_connected_to(host):
    with pytest.raises(ApiError) as error:
        asyncio.run(public_addresses(host, 443))
    assert error.value.code in ("host_not_allowed", "image_unavailable")


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory):
    """(certificate of images.example and its own authority, key) as a file each."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "images.example")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("images.example"), x509.DNSName("other.example")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(file)


@pytest.fixture(scope="module")
def host(tls_files):
    """(port, requests seen) of an https server on this machine."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.headers["Host"], self.path))
            place = self.path.removeprefix("/to/")
            if place != self.path:
                self.send_response(302)
                self.send_header("Location", "/to/loop" if place == "loop" else f"https://{place}")
                self.end_headers()
                return
            self.send_response(404 if self.path == "/none.png" else 200)
            self.end_headers()
            self.wfile.write(
                {"/good.png": picture(), "/big.png": b"x" * 5000}.get(self.path.partition("?")[0], b"<html>")
            )

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls_files)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], seen
    server.shutdown()


@pytest.fixture
def fetch(host, tls_files):
    """Loads from the server under a name of its certificate; `resolved` are the names looked up."""
    port, seen = host
    resolved = []

    async def here(name, port):
        resolved.append(name)
        if name == "inside.example":
            return await public_addresses("127.0.0.1", port)
        return ["127.0.0.1"]

    def fetching(
        path,
        name="images.example",
        allowed=("images.example", "inside.example", "stranger.example"),
        **options,
    ):
        seen.clear()
        limits = LimitsConfig(hosts=[f"{one}:{port}" for one in allowed], image_bytes=4000, fetch_seconds=10)
        return load(
            f"https://{name}:{port}{path}",
            limits=limits,
            resolve=here,
            tls=ssl.create_default_context(cafile=tls_files),
            **options,
        )

    fetching.seen, fetching.resolved, fetching.port = seen, resolved, port
    return fetching


def test_an_image_of_an_allowed_host_is_fetched(fetch):
    assert fetch("/good.png?a=b").size == (40, 20)
    assert fetch.seen == [(f"images.example:{fetch.port}", "/good.png?a=b")] and fetch.resolved == [
        "images.example"
    ]


def test_redirects_are_followed_and_checked_anew(fetch):
    assert fetch(f"/to/images.example:{fetch.port}/good.png").size == (40, 20)
    for place, code in (
        (f"other.example:{fetch.port}/good.png", "host_not_allowed"),
        (f"inside.example:{fetch.port}/good.png", "host_not_allowed"),
        ("loop", "image_unavailable"),
        ("[bad", "image_unavailable"),
    ):
        with pytest.raises(ApiError) as error:
            fetch(f"/to/{place}")
        assert error.value.code == code
    assert not [path for _, path in fetch.seen if path == "/good.png"]


@pytest.mark.parametrize(
    ("path", "options", "code"),
    [
        ("/none.png", {}, "image_unavailable"),
        ("/page", {}, "invalid_image"),
        ("/big.png", {}, "limit_exceeded"),
        ("/good.png", {"name": "other.example"}, "host_not_allowed"),
        ("/good.png", {"name": "user:word@images.example"}, "host_not_allowed"),
        # allowed, but the certificate is not its own
        ("/good.png", {"name": "stranger.example"}, "image_unavailable"),
        ("/good.png", {"name": "inside.example"}, "host_not_allowed"),
        ("/good.png", {"allowed": ()}, "invalid_image_url"),
    ],
)
def test_what_a_host_does_not_give(fetch, path, options, code):
    with pytest.raises(ApiError) as error:
        fetch(path, **options)
    assert error.value.code == code


def test_a_host_that_only_becomes_the_named_one():
    """The kelvin sign, whose lower case is k."""
    assert (
        refusal("https://\u212aite.example/x", limits=LimitsConfig(hosts=["kite.example"])).code
        == "host_not_allowed"
    )


def test_a_plain_port_of_a_named_host_is_another_host():
    limits = LimitsConfig(hosts=["images.example"])
    assert refusal("https://images.example:8443/x", limits=limits).code == "host_not_allowed"
    assert refusal("https://images.example:port/x", limits=limits).code == "invalid_image_url"
    assert refusal("https://[bad", limits=limits).code == "invalid_image_url"
    assert (
        ipaddress.ip_address("127.0.0.1")
        and refusal("https://127.0.0.1/x", limits=limits).code == "host_not_allowed"
    )
