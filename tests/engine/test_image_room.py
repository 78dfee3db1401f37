"""Who waits for whom, where images on their way take the room."""

import numpy as np
from quire_engine.request import State
from test_image_lives import LARGEST, PICTURES, Story, seeing


def test_a_text_does_not_wait_for_room_that_images_on_their_way_take() -> None:
    """The first image's pixels do not come, and it fills the room: the second waits for that, and the text goes on."""
    story = Story(seeing(LARGEST, num_pages=30, max_num_batched_tokens=64))
    story.held_back = True
    first = story.add([PICTURES[6], [1]])
    second = story.add([PICTURES[7], [1]])
    text = story.add([[1, 2, 1]])
    while text.state is not State.FINISHED:
        story.advance()
    assert first.state is second.state is State.FETCHING
    story.held_back = False
    while second.state is not State.FINISHED:
        story.advance()


def test_images_of_one_prompt_are_fetched_at_once_and_kept_for_it() -> None:
    """However many other prompts with an image come: each image of three is wanted once, or twice."""
    generator = np.random.default_rng(0)
    story = Story(seeing(9, num_pages=60, max_num_batched_tokens=64, max_num_seqs=5, max_num_queued_reqs=10**6), late=3)
    for _ in range(10):
        story.add([PICTURES[generator.integers(4, 8)], [1]], 1)
        story.advance()
    several = story.add([PICTURES[2], [1], PICTURES[3], [2], PICTURES[0]])
    while several.state is not State.FINISHED:
        story.add([PICTURES[generator.integers(4, 8)], [1]], 2)
        story.advance()
    assert max(story.wanted[picture_key] for picture_key in story.wanted if picture_key[0] in (0, 2, 3)) <= 2
