"""What a gateway reads of the picker's answers: the classes of ext_proc's responses, with Envoy's numbers of fields."""

from __future__ import annotations

from router.picker.protocol import classes

_found = classes(
    {
        "HeaderValue": "string key=1, string value=2, bytes raw_value=3",
        "HeaderValueOption": "HeaderValue header=1, enum append_action=3",
        "HeaderMutation": "HeaderValueOption* set_headers=1, string* remove_headers=2",
        "StreamedBodyResponse": "bytes body=1, bool end_of_stream=2",
        "BodyMutation": "bytes body=1|, StreamedBodyResponse streamed_response=3|",
        "CommonResponse": "HeaderMutation header_mutation=2, BodyMutation body_mutation=3, bool clear_route_cache=5",
        "HeadersResponse": "CommonResponse response=1",
        "BodyResponse": "CommonResponse response=1",
        "TrailersResponse": "HeaderMutation header_mutation=1",
        "HttpStatus": "enum code=1",
        "ImmediateResponse": "HttpStatus status=1, HeaderMutation headers=2, bytes body=3, string details=5",
        "ProcessingResponse": "HeadersResponse request_headers=1|, HeadersResponse response_headers=2|, "
        "BodyResponse request_body=3|, BodyResponse response_body=4|, TrailersResponse request_trailers=5|, "
        "TrailersResponse response_trailers=6|, ImmediateResponse immediate_response=7|, "
        "google.protobuf.Struct dynamic_metadata=8",
    },
    "kvcluster.tests.ext_proc",
)
ProcessingResponse = _found["ProcessingResponse"]
