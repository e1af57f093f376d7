"""Own data in each form becomes the same clients."""

import numpy as np
import pytest

from foedus.data import (
    Vocabulary,
    federated_vocabulary,
    from_arrays,
    from_folder,
    from_frame,
    from_torch,
    values_by_client,
)
from foedus.errors import DataCorrupt, DataError, DataNotFound, MissingExtra

COLUMNS = {
    "ward": ["n", "s", "n", "s"],
    "age": [30, 40, None, 60],
    "smokes": [True, False, True, True],
    "kind": ["a", "b", None, "a"],
    "ill": [0, 1, 1, 0],
}


def frames():
    pandas, polars, pyarrow = (pytest.importorskip(n) for n in ("pandas", "polars", "pyarrow"))
    return [
        pandas.DataFrame(COLUMNS),
        polars.DataFrame(COLUMNS),
        pyarrow.table(COLUMNS),
        pandas.DataFrame(COLUMNS).convert_dtypes(),
    ]


class TestArrays:
    def test_with_groups_and_a_test_set(self):
        data = from_arrays([[1.0], [2.0], [3.0]], [0, 1, 0], test=([[9.0]], [1]), groups={"site": [7, 8, 7]})
        clients = data.clients()
        assert clients.ids == (7, 8)
        assert clients.train(0).inputs[0].ravel().tolist() == [1, 3]
        assert clients.central_test.inputs[0].tolist() == [[9.0]]

    def test_groups_need_a_value_per_row(self):
        with pytest.raises(DataError, match=r"'site' needs one value per row: 2, not \[3\]"):
            from_arrays([[1.0], [2.0]], [0, 1], groups={"site": [1, 2, 3]})


class Listed:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class TestTorch:
    @pytest.mark.slow  # loads torch
    def test_tensor_datasets(self):
        torch = pytest.importorskip("torch")
        x, y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 2])
        whole = torch.utils.data.TensorDataset(x, x + 1, y)
        data = from_torch(whole, test=torch.utils.data.Subset(whole, [2]))
        assert [a.tolist() for a in data.train.inputs] == [x.tolist(), (x + 1).tolist()]
        assert data.train.targets.tolist() == [0, 1, 2]
        assert data.test.targets.tolist() == [2]

    def test_anything_of_that_shape(self):
        data = from_torch(Listed([(np.ones((2, 2)), 0), (np.zeros((2, 2)), 1)]), groups={"who": ["a", "b"]})
        assert data.clients().train(1).inputs[0].shape == (1, 2, 2)

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            (iter([]), "without a length"),
            (Listed([]), "dataset is empty"),
            (Listed([np.ones(2)]), r"dataset\[0\] must be \(x, y\)"),
            (Listed([(np.ones(2), 0), (np.ones(3), 0)]), r"dataset\[1\] has shapes .*\(3,\)"),
            (Listed([("text", 0)]), r"dataset\[0\] holds <U4"),
        ],
    )
    def test_what_does_not_fit_is_named(self, dataset, message):
        with pytest.raises(DataError, match=message):
            from_torch(dataset)


@pytest.mark.slow  # loads pandas and polars
class TestFrames:
    def test_every_kind_of_frame_gives_the_same(self):
        for frame in frames():
            data = from_frame(frame, target="ill", client="ward", categories={"kind": ["a", "b"]})
            clients = data.clients()
            assert clients.ids == ("n", "s")
            assert data.columns == ("age", "smokes", "kind=a", "kind=b")
            wanted = [[[30, 1, 1, 0], [np.nan, 1, 0, 0]], [[40, 0, 0, 1], [60, 1, 1, 0]]]
            for i in range(2):
                assert np.array_equal(clients.train(i).inputs[0], np.array(wanted[i], np.float32), equal_nan=True)
            assert data.train.targets.tolist() == [0, 1, 1, 0]
            assert data.train.targets.dtype == np.int64

    def test_the_vocabulary_can_be_found_without_pooling(self):
        for frame in frames():
            found = federated_vocabulary(values_by_client(frame, "kind", client="ward"))
            assert found.words == ("a", "b")
            assert found.clients == (2, 1)
            data = from_frame(frame, target="ill", client="ward", inputs=["kind"], categories={"kind": found})
            assert data.train.inputs[0].tolist() == [[1, 0], [0, 1], [0, 0], [1, 0]]

    def test_a_target_of_categories_and_a_test_frame(self):
        frame = frames()[0].dropna()
        data = from_frame(frame, target="kind", inputs=["age"], categories={"kind": Vocabulary(("a", "b"))}, test=frame)
        assert data.train.targets.tolist() == [0, 1, 0]
        assert data.classes == ("a", "b")
        assert len(data.test) == 3
        assert data.groups == {}

    def test_test_rows_go_to_their_clients(self):
        frame = frames()[1]
        clients = from_frame(frame, target="ill", client="ward", inputs=["age"], test=frame[:1]).clients()
        assert len(clients.test(0)) == 1
        assert len(clients.test(1)) == 0

    def test_whole_numbers_name_clients_and_floats_are_targets(self):
        pandas = pytest.importorskip("pandas")
        clients = from_frame(
            pandas.DataFrame({"k": [3, 1], "x": [1, 2], "y": [0.5, 1.5]}), target="y", client="k"
        ).clients()
        assert clients.ids == (1, 3)
        assert clients.train(0).targets.dtype == np.float32

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"target": "sick"}, "no column 'sick'; there are: 'ward', 'age'"),
            ({"target": "ill", "inputs": ["weight"]}, "no column 'weight'"),
            ({"target": "ill", "client": "site"}, "no column 'site'"),
            ({"target": "ill", "client": "ward"}, "'kind' holds .*categories={'kind'"),
            ({"target": "age", "inputs": ["smokes"]}, "target 'age' is missing in 1 rows"),
            (
                {"target": "ill", "inputs": ["age"], "client": "kind"},
                "client column 'kind' is empty in 1 rows",
            ),
            ({"target": "ward", "inputs": ["age"], "categories": {"ward": ["n"]}}, "has the value 's'"),
            ({"target": "ill", "inputs": []}, "no column left"),
        ],
    )
    def test_what_does_not_fit_is_named(self, arguments, message):
        for frame in frames():
            with pytest.raises(DataError, match=message):
                from_frame(frame, **arguments)

    def test_a_lazy_frame_is_pointed_to_collect(self):
        with pytest.raises(DataError, match=r"LazyFrame.*frame\.collect\(\)"):
            from_frame(frames()[1].lazy(), target="ill")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "north.csv").write_text("age,y\n1,0\n2,1\n")
    (tmp_path / "south").mkdir()
    (tmp_path / "south" / "2023.csv").write_text("y,age\n1,3\n")
    (tmp_path / "south" / "2024.csv").write_text("y,age\n0,\n")
    (tmp_path / "south" / "test.csv").write_text("age,y\n9,1\n")
    (tmp_path / ".notes").write_text("passed over")
    return tmp_path


@pytest.mark.slow  # loads pyarrow
class TestFolders:
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_files_and_sub_folders(self, folder, in_memory):
        pytest.importorskip("pyarrow")
        clients = from_folder(folder, target="y", in_memory=in_memory)
        assert list(clients.ids) == ["north", "south"]
        assert clients.train(0).inputs[0].ravel().tolist() == [1, 2]
        assert np.array_equal(clients.train(1).inputs[0].ravel(), [3, np.nan], equal_nan=True)
        assert clients.train(1).targets.tolist() == [1, 0]
        assert len(clients.test(0)) == 0
        assert clients.test(1).inputs[0].tolist() == [[9.0]]
        assert clients.validation(0) is None
        assert (clients.pool is not None) == in_memory

    def test_parquet(self, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.table({"x": [1.0, None], "y": [0, 1]}), tmp_path / "a.parquet")
        clients = from_folder(tmp_path, target="y")
        assert np.array_equal(clients.train(0).inputs[0].ravel(), [1, np.nan], equal_nan=True)

    def test_a_column_without_any_value_in_one_file(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,y\n,0\n,1\n")
        (tmp_path / "b.csv").write_text("x,y\n1.5,0\n")
        assert np.isnan(from_folder(tmp_path, target="y").train(0).inputs[0]).all()

    def test_npz_of_several_inputs(self, tmp_path):
        for name in ("a", "b"):
            np.savez(tmp_path / f"{name}.npz", image=np.ones((2, 3, 3)), code=np.array([1, 2]), y=np.array([0, 1]))
        clients = from_folder(tmp_path, target="y")
        assert [a.shape for a in clients.train(1).inputs] == [(2, 3, 3), (2,)]
        assert from_folder(tmp_path, target="y", inputs=["code"]).train(0).inputs[0].tolist() == [1, 2]
        with pytest.raises(DataError, match=r"a\.npz there is no array 'label'"):
            from_folder(tmp_path, target="label")

    @pytest.mark.parametrize("in_memory", [True, False])
    @pytest.mark.parametrize("ending", ["npz", "parquet"])
    def test_truncated_files_are_named(self, tmp_path, ending, in_memory):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        for name in ("a", "b"):
            file = tmp_path / f"{name}.{ending}"
            if ending == "npz":
                np.savez(file, x=np.ones((200, 3)), y=np.zeros(200))
            else:
                parquet.write_table(pyarrow.table({"x": [1.0] * 200, "y": [0] * 200}), file)
        file.write_bytes(file.read_bytes()[:300])
        with pytest.raises(DataCorrupt, match=rf"b\.{ending} cannot be read"):
            from_folder(tmp_path, target="y", in_memory=in_memory).train(1)

    def test_a_damaged_csv_is_named(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,y\n1,2\n3\n")
        with pytest.raises(DataCorrupt, match=r"a\.csv cannot be read"):
            from_folder(tmp_path, target="y")

    def test_pickled_objects_are_not_loaded(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.array([{}], object), y=np.zeros(1))
        with pytest.raises(DataCorrupt, match=r"a\.npz"):
            from_folder(tmp_path, target="y")

    def test_a_file_with_other_columns_is_named(self, folder):
        (folder / "west.csv").write_text("weight,y\n1,0\n")
        with pytest.raises(DataError, match=r"west\.csv: There is no column 'age'"):
            from_folder(folder, target="y")

    def test_text_without_categories_is_named(self, folder):
        (folder / "north.csv").write_text("age,y\nold,0\n")
        with pytest.raises(DataError, match=r"north\.csv: The column 'age' holds String"):
            from_folder(folder, target="y")
        known = from_folder(folder, target="y", categories={"age": ["old", "3"]})
        assert known.train(0).inputs[0].tolist() == [[1, 0]]
        assert known.train(1).inputs[0].tolist() == [[0, 1], [0, 0]]

    def test_other_files_and_doubles_are_refused(self, folder):
        (folder / "readme.txt").write_text("hello")
        with pytest.raises(DataError, match=r"readme\.txt is not a file that can be read"):
            from_folder(folder, target="y")
        (folder / "readme.txt").unlink()
        (folder / "south.csv").write_text("age,y\n1,0\n")
        with pytest.raises(DataError, match="for the client 'south'"):
            from_folder(folder, target="y")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(DataNotFound, match="no folder"):
            from_folder(tmp_path / "nowhere", target="y")
        with pytest.raises(DataNotFound, match="no files of clients"):
            from_folder(tmp_path, target="y")
        (tmp_path / "a").mkdir()
        with pytest.raises(DataNotFound, match="no files of clients"):
            from_folder(tmp_path, target="y")

    def test_without_pyarrow(self, folder, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtra, match="'pyarrow'"):
            from_folder(folder, target="y")
