"""gRPC's server side over HTTP/2, for services whose calls cost little: messages in and out as bytes, on asyncio."""
