"""Small files in the layout of the official ones."""

import csv
import io
import pathlib
import tarfile
import zipfile

import numpy as np

from histjax.data import kuairand

USERS_DAT = '1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n'
MOVIES_DAT = (
  "1::Toy Story (1995)::Animation|Children's|Comedy\n"
  '7::Am\xe9lie\x85 (Le) (2001)::Comedy\n'
  '3952::Six (1919)::Action|Adventure|Comedy|Drama|Sci-Fi|War\n'
)
RATINGS_DAT = (
  '1::7::5::978300760\n'
  '1::1::3::978300760\n'  # Tied: the order of the file decides.
  '1::3952::4::978300000\n'
  '3::1::2::978301968\n'
)

USER_HEADER = (
  'user_id,user_active_degree,is_lowactive_period,is_live_streamer,'
  'is_video_author,follow_user_num,follow_user_num_range,fans_user_num,'
  'fans_user_num_range,friend_user_num,friend_user_num_range,register_days,'
  'register_days_range,' + ','.join(f'onehot_feat{i}' for i in range(18))
)
USERS_CSV = '\n'.join(
  [
    USER_HEADER,
    '0,full_active,0,1,1,514,500+,150,"[100,1k)",34,"[30,60)",799,730+,'
    '1,1,29,949,1.0,0,0,14,135,6,3,0,0.0,1.0,0.0,0.0,0.0,0.0',
    '5,UNKNOWN,0,-124,0,0,0,0,0,0,0,14,8-14,'
    '0,6,49,1470,,33,2,117,453,0,4,4,,,,,,',
    '',
  ]
)
VIDEOS_CSV = """\
video_id,author_id,video_type,upload_dt,upload_type,visible_status,\
video_duration,server_width,server_height,music_id,music_type,tag
0,7349781,NORMAL,2022-04-10,LongImport,0.0,87433.0,720.0,1280.0,9155697141,9.0,39
3,0,UNKNOWN,2022-04-11,UNKNOWN,0.0,,720.0,1280.0,0,,
9,21,AD,2022-04-09,Web,0.0,5000.0,720.0,1280.0,5,11.0,"68,2,1"
"""
LOG_HEADER = (
  'user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,'
  'is_comment,is_forward,is_hate,long_view,play_time_ms,duration_ms,'
  'profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab'
)
# 1651363200000 is 2022-05-01 08:00 in China.
LATE_CSV = f"""\
{LOG_HEADER}
0,0,20220430,2300,1651363199000,1,1,0,0,0,0,1,87433,87433,0,0,0,0,1
0,3,20220501,800,1651363200000,0,0,0,0,0,0,0,0,0,0,0,0,0,2
0,3,20220501,800,1651363200000,0,0,0,0,0,0,0,0,0,0,0,0,0,2
0,9,20220503,900,1651539600000,1,0,0,0,0,0,0,1500,5000,0,0,1,0,14
5,9,20220502,100,1651424400000,1,0,1,0,0,0,1,9000,5000,0,0,0,0,0
"""
EARLY_CSV = f"""\
{LOG_HEADER}
5,0,20220409,100,1649437200000,0,0,0,0,0,1,0,1,87433,0,0,0,0,3
"""


def movielens_files() -> dict[str, bytes]:
  return {
    'ratings.dat': RATINGS_DAT.encode('latin-1'),
    'users.dat': USERS_DAT.encode('latin-1'),
    'movies.dat': MOVIES_DAT.encode('latin-1'),
  }


def kuairand_files(early: bool = False) -> dict[str, bytes]:
  late, users, videos = kuairand.SOURCE.files
  files = {late: LATE_CSV, users: USERS_CSV, videos: VIDEOS_CSV}
  if early:
    files[kuairand.SOURCE.optional[0]] = EARLY_CSV
  return {name: text.encode() for name, text in files.items()}


def write_folder(manual_dir: pathlib.Path, folder: str, files) -> None:
  for name, content in files.items():
    path = manual_dir / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def zip_archive(folder: str, files) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as archive:
    for name, content in files.items():
      # With a fixed date: the archive is the same whenever it is made.
      archive.writestr(zipfile.ZipInfo(f'{folder}/{name}'), content)
  return out.getvalue()


def tar_archive(folder: str, files) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w:gz') as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(f'{folder}/{name}')
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return out.getvalue()


def read_csv(path) -> list[dict[str, str]]:
  """Rows of a CSV file, with the standard library alone."""
  with open(path, newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


def read_dat(path, fields: int) -> np.ndarray:
  """Integer records of a MovieLens file, as int64 `[n, fields]`."""
  numbers = np.fromstring(
    pathlib.Path(path).read_text('latin-1').replace('::', ' '),
    dtype=np.int64,
    sep=' ',
  )
  return numbers.reshape(-1, fields)
