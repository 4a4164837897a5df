"""Music as data: songs to keys and back, MIDI files and JSON, and songs that are moved up or down."""

import json
import zipfile

import pytest
import torch

from pyrovae import data, plots
from pyrovae.cli import main
from pyrovae.cli.pictures import as_pictures
from pyrovae.data import PianoRoll, is_music, load, load_music, random_transposition, read_music, write_midi

mido = pytest.importorskip("mido")
SONG = [[60, 64, 67], [60, 64, 67], [], [62], [62, 65]]


def song(i, length=8):
    return [[48 + (i + t) % 12, 60 + (i + t) % 12] for t in range(length)]


@pytest.fixture
def file(tmp_path):
    """Forty songs of 4 to 11 steps in the parts of a JSON file."""
    songs = [song(i, 4 + i % 8) for i in range(40)]
    path = tmp_path / "songs.json"
    path.write_text(json.dumps({"train": songs[:30], "valid": songs[30:35], "test": songs[35:]}))
    return path


def write_messages(path, messages, ticks=96, **header):
    """Writes a MIDI file of (kind, note, velocity, ticks since the last message, channel)."""
    midi = mido.MidiFile(ticks_per_beat=ticks, **header)
    track = mido.MidiTrack()
    for kind, note, velocity, time, channel in messages:
        track.append(mido.Message(kind, note=note, velocity=velocity, time=time, channel=channel))
    midi.tracks.append(track)
    midi.save(path)


def test_keys_are_on_where_a_note_sounds_and_back():
    roll = PianoRoll(lowest=60, num_keys=12, per_quarter=1, num_steps=3)
    x, owners = roll.encode([SONG, [[71]]])
    assert owners.tolist() == [0, 0, 1]
    assert x.shape == (3, 3, 12)
    assert [x[0, t].nonzero().flatten().tolist() for t in range(3)] == [[0, 4, 7], [0, 4, 7], []]
    assert x[1, 2].isnan().all()
    assert not x[1, :2].isnan().any()
    assert x[2, 1:].isnan().all()
    assert roll.decode(x) == [SONG[:3], SONG[3:], [[71]]]


@pytest.mark.parametrize("per_quarter", [1, 3, 4, 7, 1000])
def test_a_midi_file_that_is_written_reads_back(tmp_path, per_quarter):
    rests = [[], *SONG, [], []]
    write_midi([rests, song(3)], tmp_path / "two.mid", per_quarter)
    [again] = read_music(tmp_path / "two.mid", per_quarter).values()
    assert again == [*rests, *[[]] * 4 * per_quarter, *song(3)]
    write_midi([rests], tmp_path / "one.mid", per_quarter)
    assert [*read_music(tmp_path / "one.mid", per_quarter).values()] == [rests]


def test_notes_of_midi_begin_and_end_at_the_nearest_step(tmp_path):
    write_messages(
        tmp_path / "a.mid",
        [
            ("note_on", 60, 80, 96 + 5, 0),  # a beat of silence before, and 5 ticks late
            ("note_on", 60, 0, 90, 0),  # without velocity it ends: after about a beat
            ("note_on", 64, 80, 0, 1),
            ("note_off", 64, 0, 2, 1),  # shorter than a step: it lasts one
            ("note_on", 67, 80, 94, 0),
            ("note_on", 67, 80, 96, 0),  # struck again
            ("note_off", 67, 0, 96, 0),  # ends both: no other end follows
            ("note_on", 72, 80, 0, 2),  # never ends: the file does
            ("note_on", 40, 80, 96, 9),  # a drum
        ],
    )
    with pytest.warns(UserWarning, match="a.mid have drums, which are left out"):
        [found] = read_music(tmp_path / "a.mid", per_quarter=1).values()
    assert found == [[], [60], [64], [67], [67], [72]]
    with pytest.warns(UserWarning, match="drums"):
        [found] = read_music(tmp_path / "a.mid", per_quarter=2).values()
    assert found == [[], [], [60], [60], [64], [], [67], [67], [67], [67], [72], [72]]


def test_tracks_of_one_channel_and_notes_that_overlap_keep_their_ends(tmp_path):
    held = [("note_on", 60, 80, 0, 0), ("note_off", 60, 0, 4 * 96, 0)]
    short = [("note_on", 60, 80, 96, 0), ("note_off", 60, 0, 96, 0)]
    midi = mido.MidiFile(ticks_per_beat=96)
    for part in (held, short):
        write_messages(tmp_path / "part.mid", part)
        midi.tracks += mido.MidiFile(tmp_path / "part.mid").tracks
    midi.save(tmp_path / "both.mid")
    assert [*read_music(tmp_path / "both.mid", 1).values()] == [[[60]] * 4]
    twice = [("note_on", 60, 80, 0, 0), ("note_on", 60, 80, 96, 0), ("note_off", 60, 0, 96, 0)]
    write_messages(tmp_path / "twice.mid", [*twice, ("note_off", 60, 0, 96, 0)])
    assert [*read_music(tmp_path / "twice.mid", 1).values()] == [[[60]] * 3]
    write_messages(tmp_path / "once.mid", [*twice, ("note_on", 62, 80, 96, 0), ("note_off", 62, 0, 96, 0)])
    assert [*read_music(tmp_path / "once.mid", 1).values()] == [[[60], [60], [], [62]]]


def test_notes_between_steps_files_without_notes_and_others_are_said(tmp_path):
    write_messages(tmp_path / "triplet.mid", [("note_on", 60, 80, 32, 0), ("note_off", 60, 0, 64, 0)])
    with pytest.warns(UserWarning, match="100% of the notes begin between the 4 steps of a quarter note"):
        read_music(tmp_path / "triplet.mid")
    assert [*read_music(tmp_path / "triplet.mid", per_quarter=3).values()] == [[[], [60], [60]]]
    write_messages(tmp_path / "drums.mid", [("note_on", 40, 80, 0, 9)])
    (tmp_path / "cover.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"drums.mid hold no notes and are left out; 1 pictures are not read"):
        assert [*read_music(tmp_path, per_quarter=3)] == ["triplet.mid"]


def test_json_with_parts_a_list_a_folder_and_an_archive_are_music(tmp_path, file):
    splits = load(file)
    assert splits.piano_roll == PianoRoll(21, 88, 1, 11)
    assert [len(part.x) for part in splits] == [30, 5, 5]
    assert splits.test.rows.tolist() == [36, 37, 38, 39, 40]
    assert splits.piano_roll.decode(splits.validation.x)[0] == song(30, 4 + 30 % 8)

    (tmp_path / "list.json").write_text(json.dumps([song(i) for i in range(30)]))
    assert [len(part.x) for part in load(tmp_path / "list.json")] == [24, 3, 3]

    folder = tmp_path / "midi"
    for i in range(20):
        (folder / ("major" if i < 8 else "minor")).mkdir(parents=True, exist_ok=True)
        write_midi([song(i, 4 + i)], folder / ("major" if i < 8 else "minor") / f"{i:02d}.mid")
    splits = load_music(folder, num_steps=8)
    assert splits.piano_roll == PianoRoll(21, 88, 4, 8)
    assert sorted({*splits.train.labels.tolist()}) == [0, 1]
    of = {row: int(label) for row, label in zip(splits.train.rows.tolist(), splits.train.labels, strict=True)}
    assert all(label == (row > 8) for row, label in of.items())
    with zipfile.ZipFile(tmp_path / "songs.zip", "w") as archive:
        for path in sorted(folder.rglob("*.mid")):
            archive.write(path, path.relative_to(tmp_path))
    zipped = load(tmp_path / "songs.zip")
    assert torch.equal(load(folder).test.x.nan_to_num(9), zipped.test.x.nan_to_num(9))
    assert all(map(is_music, (file, folder, tmp_path / "songs.zip", folder / "minor" / "19.mid")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([song(0), song(1), [[60], [200]]], r"song 3 of .* has 200 in step 2. A step is a list of notes"),
        ([song(0), song(1), [[60.5]]], r"song 3 of .* has 60.5 in step 1"),
        ([song(0), song(1), [[float("nan")]]], r"song 3 of .* has nan in step 1"),
        ([song(0), song(1), [[True]]], r"song 3 of .* has True in step 1"),
        ([song(0), song(1), [[-1]]], r"song 3 of .* has -1 in step 1. .* a rest is an empty list"),
        ([song(0), song(1), [60, 61]], r"step 1 of song 3 of .* is 60. A step is a list of notes: \[60\]"),
        ([song(0), song(1), [None]], r"song 3 of .* has None in step 1"),
        ([song(0), song(1), "60"], r"song 3 of .* has no step"),
        (song(0), r"song 1 of .* has|step 1 of song 1"),
        ([60, 61], r"song 1 of .* has no step: a song is a list of steps"),
        ([], r"holds no songs. Give a list of songs"),
        ({"train": [song(0)], "test": [song(1), []]}, r"song test/2 of .* has no step"),
        ({"train": [song(0)], "test": []}, r"has train, test. Give at least the parts train and test, with songs"),
        ({"train": [song(0)], "test": [song(1)], "by": "me"}, r"holds no songs. .* and nothing else"),
        ([song(0), song(1)], r"holds 2 songs, too few to split"),
    ],
)
def test_json_that_holds_no_songs_is_said_to(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_music(tmp_path / "bad.json")


def test_files_that_are_no_music_are_said_to_be_none(tmp_path):
    (tmp_path / "table.json").write_text('[{"a": 1}, {"a": 2}]')
    assert not is_music(tmp_path / "table.json")
    with pytest.raises(ValueError, match="holds no songs. Give a list of songs"):
        read_music(tmp_path / "table.json")
    (tmp_path / "broken.mid").write_bytes(b"MThd\x00\x00\x00\x06\x00\x01")
    with pytest.raises(ValueError, match=r"broken.mid cannot be read as a MIDI file"):
        read_music(tmp_path / "broken.mid")
    write_messages(tmp_path / "drums.mid", [("note_on", 40, 80, 0, 9)])
    with pytest.raises(ValueError, match="holds no song with notes"):
        read_music(tmp_path / "drums.mid")
    with pytest.raises(ValueError, match=r"broken.mid cannot be read .*EOFError.*"):
        read_music(tmp_path)
    write_messages(tmp_path / "long.mid", [("note_on", 60, 80, 0, 0), ("note_on", 61, 80, 2**28 - 1, 0)], ticks=1)
    with pytest.raises(ValueError, match=r"steps, more than 1,000,000"):
        read_music(tmp_path / "long.mid")
    with pytest.raises(FileNotFoundError):
        read_music(tmp_path / "none.mid")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no song"):
        read_music(tmp_path / "empty")
    with pytest.raises(ValueError, match="per_quarter must be at least 1"):
        read_music(tmp_path / "long.mid", per_quarter=0)
    with pytest.raises(ValueError, match=r"songs\[0\] has 200 in step 1"):
        write_midi([[[200]]], tmp_path / "none.mid")


def test_a_note_beyond_the_keys_is_refused():
    with pytest.raises(ValueError, match=r"songs\[1\] has note 10 in step 3, and the notes here are 21 to 108"):
        PianoRoll(21, 88, 1, 4).encode([SONG, [[30], [30], [10]]])
    assert PianoRoll.of([SONG, [[10]]], 1) == PianoRoll(0, 128, 1, 5)


def test_songs_move_as_a_whole_within_the_keys():
    torch.manual_seed(0)
    x = torch.zeros(3000, 4, 12)
    x[:, torch.arange(4), torch.tensor([2, 5, 10, 0])] = 1.0
    mask = torch.tensor([True, True, True, False]).expand(3000, 4)  # the last step, at key 0, is none
    moved, same = random_transposition(x, mask, semitones=3)
    assert same is mask
    keys = moved.argmax(-1)
    by = keys[:, 0] - 2
    assert ((keys[:, 1] == 5 + by) & (keys[:, 2] == 10 + by)).all()
    assert (moved[:, :3].sum(-1) == 1).all()
    share = torch.bincount(by + 3) / 3000  # from -2, at which a note is on the lowest key, to 1
    expected = torch.tensor([0, 2, 1, 1, 3]) / 7
    error = (expected * (1 - expected) / 3000).sqrt()
    assert len(share) == len(expected)
    assert ((share - expected).abs() <= 4.5 * error).all()
    assert torch.equal(random_transposition(x, mask, semitones=0)[0], x)


def test_a_run_on_songs_draws_goes_on_with_scores_and_embeds_them(file, tmp_path, capsys):
    run = tmp_path / "run"
    small = ["--latent_dim", "2", "--batch_size", "10", "--num_samples", "4"]
    main(["train", "--data", str(file), "--epochs", "2", *small, "--run", str(run)])
    printed = capsys.readouterr().out
    assert "notes 21 to 108, on or off; steps of a quarter note; pieces of up to 11 steps" in printed
    assert "nats a step" in printed
    assert json.loads((run / "piano_roll.json").read_text()) == PianoRoll(21, 88, 1, 11).to_dict()
    main(["train", "--resume", "--run", str(run), "--epochs", "3", "--quiet"])

    main(["sample", str(run), "--num_samples", "3", "--steps", "5"])
    [drawn] = read_music(run / "samples-0.mid", 1).values()
    assert 5 < len(drawn) <= 3 * 5 + 2 * 4
    main(["sample", str(run), "--num_samples", "3", "--output", str(tmp_path / "s.json")])
    assert [len(each) for each in json.loads((tmp_path / "s.json").read_text())] == [11] * 3
    main(["reconstruct", str(run), "--num_data", "2", "--output", str(tmp_path / "r.json")])
    pairs = json.loads((tmp_path / "r.json").read_text())
    assert [pairs[0], pairs[2]] == [song(35, 7), song(36, 8)]
    assert [len(each) for each in pairs] == [7, 7, 8, 8]
    main(["forecast", str(run), "--num_data", "2", "--steps", "3", "--output", str(tmp_path / "f.json")])
    longer = json.loads((tmp_path / "f.json").read_text())
    assert [longer[0][:7], longer[1][:8]] == [song(35, 7), song(36, 8)]
    assert [len(each) for each in longer] == [10, 11]
    main(["score", str(run), str(file), "--num_samples", "2", "--output", str(tmp_path / "scores.csv")])
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "song,from,to,log_p,standard_error,trusted,steps,nats_a_step"
    assert lines[36].startswith("test/1,0.000,7.000,")
    main(["encode", str(run), str(file), "--output", str(tmp_path / "e.csv")])
    assert (tmp_path / "e.csv").read_text().startswith("song,from,to,mean_1,mean_2,")
    for ending in ("png", "npy"):
        main(["sample", str(run), "--num_samples", "2", "--output", str(tmp_path / f"s.{ending}")])
        assert (tmp_path / f"s.{ending}").stat().st_size > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--characters", "true"], "characters, max_words and tokenizer are for text"),
        (["--per_quarter", "0"], "per_quarter must be a whole number of at least 1"),
        (["--structure", "Incomplete"], "shift moves images, or songs of a model of sequences"),
        (["--likelihood", "Normal"], "is a density, and keys are on or off. Take --likelihood SigmoidBelief"),
    ],
)
def test_options_that_do_not_fit_songs_are_refused(file, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        main(["train", "--data", str(file), "--run", str(tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()


def test_songs_do_not_take_the_schema_of_a_table(file):
    with pytest.raises(ValueError, match="holds arrays, pictures, sounds or music"):
        data.load(str(file), decimal=",")


def test_pictures_leave_out_keys_that_nobody_plays():
    x = torch.zeros(3, 10, 88)
    x[:, torch.arange(10), 40 + torch.arange(10)] = 1.0
    x[2, 7:] = torch.nan
    shown = as_pictures(x)
    assert shown.shape == (3, 1, 10, 10)
    assert torch.equal(shown[0, 0].flip(0), torch.eye(10))
    assert as_pictures(torch.zeros(3, 10, 88)).shape == (3, 1, 88, 10)
    x[:, 8:] = torch.nan  # nor steps that no song has
    assert as_pictures(x).shape == (3, 1, 8, 8)


def test_a_single_song_has_a_place_in_the_plane_of_the_latents(tmp_path):
    plots.latent_space(torch.randn(1, 4), path=tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 100


def test_steps_of_a_quarter_note_are_for_music_alone(tmp_path):
    (tmp_path / "lines.txt").write_text("one line\nof words\n" * 20)
    with pytest.raises(SystemExit, match="per_quarter is for music"):
        main(["train", "--data", str(tmp_path / "lines.txt"), "--run", str(tmp_path / "run"), "--per_quarter", "4"])
