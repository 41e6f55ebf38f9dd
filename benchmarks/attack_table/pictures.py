"""Attacks by images in rows, in files of the fine-tuning API and in requests."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

_ROWS = "rows with images"
_REQUESTS = "requests with images"
_ALL = "rows, files of the fine-tuning API, requests with images"

PICTURES = (
    Attack(
        "a decompression bomb: a PNG of a few bytes with 30,000 x 30,000 pixels, or 12,000 x 12,000",
        _ALL,
        "refused by its head, before a decoder begins: at most 89,478,485 pixels",
        "pictures.test_no_decoder_begins_with_a_bomb",
    ),
    Attack(
        "the same in several images, each of which is allowed",
        _ALL,
        "536,870,912 pixels in a row or a request, ten images in a row of the API",
        "pictures.test_many_images_are_no_bomb_together",
    ),
    Attack(
        "a large image among many small ones, where the model takes all in the size of the largest",
        _REQUESTS,
        "at most 1 GiB as the model takes them",
        "pictures.test_what_a_model_gets_of_small_files_is_bounded",
    ),
    Attack(
        "an image with another size than its head says, for which the prompt has places",
        _REQUESTS,
        "refused when it is decoded",
        "pictures.test_an_image_that_lies_about_its_size_is_not_computed",
    ),
    Attack(
        "a truncated PNG, JPEG, WEBP or TIFF",
        "rows, requests with images",
        "a bad row or a 400: whatever a decoder raises",
        "pictures.test_a_truncated_image_ends_its_row_and_nothing_else",
    ),
    Attack(
        "an EPS file (Ghostscript would run it), SVG, PDF, ICO or PPM under the name of a PNG",
        _ALL,
        "six decoders of Pillow may be used; of the API, three",
        "pictures.test_no_other_decoder_is_reached",
    ),
    Attack(
        "a small file that takes minutes or gigabytes to decode: a JPEG with thousands of scans, a tile of a TIFF",
        _ALL,
        "decoded in a process that is ended after 1.5 s and 0.1 s for each million pixels, or at 2.5 GiB",
        "pictures.test_an_image_takes_no_more_time_or_memory_than_it_may",
    ),
    Attack(
        "such a file, while others send images",
        _REQUESTS,
        "each image is decoded in a process that decodes no other meanwhile",
        "pictures.test_a_small_image_of_others_is_decoded_beside_the_worst",
    ),
    Attack(
        "several such files in requests of one key, while another key sends a small image",
        _REQUESTS,
        "the local engine decodes two images at the same time, which are of different keys",
        "pictures.test_a_request_with_a_small_image_is_answered_beside_the_worst_of_another_key",
    ),
    Attack(
        "a path out of the folder of the rows: `..`, absolute, `file://`, escaped, through a link",
        _ROWS,
        "refused, by its name and by where its links lead",
        "pictures.test_a_row_reads_no_file_outside_of_its_folder",
    ),
    Attack(
        "a path of the server's machine",
        _REQUESTS,
        "requests have data URLs alone",
        "pictures.test_a_request_reads_no_file_at_all",
    ),
    Attack(
        "thousands of images in a row",
        "rows, requests with images",
        "at most 256",
        "pictures.test_a_row_holds_no_more_images_than_it_may",
    ),
    Attack(
        "a web address that only the server, or the machine that trains, can reach (SSRF)",
        _ALL,
        "nothing is fetched, in chat completions and `/v1/responses` too",
        "pictures.test_no_address_is_fetched_for_an_image",
    ),
    Attack(
        "a data URL of 100 MB",
        "requests and files of the fine-tuning API",
        "8 MiB of a body are read, then 413; an image in a file has at most 10 MB",
        "pictures.test_an_image_of_a_hundred_megabytes_is_not_read",
    ),
)
